"""The core: the teacher's own transformer, run over packed chunks."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModel, DynamicCache, PreTrainedModel

from bytekernels.ragged import positions
from models.config import ByteLMConfig

ATTENTION = "bytekernels_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_chunks: Tensor | None = None,
    longest: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a packed batch, for transformers' ``AttentionInterface``.

    Args:
        module: the attention module (unused; part of the interface).
        query, key, value: [1, heads, M, head_dim] packed, or [B, heads, M, head_dim] when decoding with a cache.
        attention_mask: always None: no M x M mask is ever made.
        scaling: of the logits.
        dropout: not supported while packed; must be 0.
        sliding_window: keys further back than this are not seen.
        softcap: not supported.
        cu_chunks: int32 [S+1], or None when decoding: then all keys belong to the one sequence, up to the last query.
        longest: rows of the longest sequence, which CUDA's kernel asks for.

    Returns:
        [1, M, heads, head_dim] and None.

    Raises:
        ValueError: dropout or soft-capping is asked for.
    """
    if dropout or softcap:
        raise ValueError(f"packed attention has neither dropout nor softcap, got dropout={dropout}, softcap={softcap}")
    if cu_chunks is None:
        out = _attend(query, key, value, scaling, sliding_window)
        return out.transpose(1, 2), None
    if query.device.type == "cuda":
        return _varlen(query, key, value, cu_chunks, longest, scaling, sliding_window), None
    return _by_sequence(query, key, value, cu_chunks, scaling, sliding_window), None


def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, cu_chunks: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Sequence after sequence in fp32: on the CPU the bf16 kernel's backward takes three times as long."""
    lengths = (cu_chunks[1:] - cu_chunks[:-1]).tolist()
    with torch.autocast(query.device.type, enabled=False):
        parts = (
            tensor.to(torch.promote_types(tensor.dtype, torch.float32)).split(lengths, 2)
            for tensor in (query, key, value)
        )
        outputs = [_attend(q, k, v, scaling, window) for q, k, v in zip(*parts, strict=True) if q.shape[2]]
        return torch.cat(outputs, dim=2).transpose(1, 2).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    rows, columns = query.shape[2], key.shape[2]
    mask = None
    if (window is not None and columns > window) or rows not in (1, columns):
        behind = torch.arange(columns - rows, columns, device=query.device)[:, None] - torch.arange(
            columns, device=query.device
        )
        mask = (behind >= 0) & (behind < (window or columns))
    return F.scaled_dot_product_attention(
        query, key, value, mask, scale=scaling, is_causal=mask is None and rows > 1, enable_gqa=True
    )


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_chunks: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All sequences in one call of flash attention, which takes 16-bit inputs: float32 ones are rounded to bf16."""
    from torch.nn.attention.varlen import varlen_attn

    half = value.dtype if value.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    q, k, v = (tensor[0].transpose(0, 1).to(half) for tensor in (query, key, value))  # [M, heads, head_dim]
    out = varlen_attn(
        q, k, v, cu_chunks, cu_chunks, longest, longest,
        scale=scaling, window_size=(window - 1 if window else -1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return cast(Tensor, out)[None].to(query.dtype)


AttentionInterface.register(ATTENTION, packed_attention)


def run_packed(backbone: PreTrainedModel, embeddings: Tensor, cu_chunks: Tensor) -> Tensor:
    """Run a transformer over packed sequences.

    Args:
        backbone: a model without head that accepts ``inputs_embeds``, set to :data:`ATTENTION` (:func:`use_packed`).
        embeddings: [M, d_core].
        cu_chunks: int32 [S+1].

    Returns:
        [M, d_core], the last hidden state (after the model's last norm).
    """
    if embeddings.shape[0] == 0:
        return embeddings
    return backbone(
        inputs_embeds=embeddings[None],
        position_ids=positions(cu_chunks, embeddings.shape[0])[None],
        cu_chunks=cu_chunks,
        longest=int((cu_chunks[1:] - cu_chunks[:-1]).max()),
        use_cache=False,
    ).last_hidden_state[0]


def use_packed(model: PreTrainedModel) -> PreTrainedModel:
    """Set a transformers model to packed attention, and return it."""
    model.set_attn_implementation(ATTENTION)
    return model


class Core(nn.Module):
    """The teacher's transformer without embeddings, over chunk embeddings."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.backbone = use_packed(AutoModel.from_config(config.core_config()))
        self.backbone.set_input_embeddings(nn.Identity())  # chunks come as embeddings

    def forward(self, chunks: Tensor, cu_chunks: Tensor) -> Tensor:
        """[M, d_core] to [M, d_core], causal inside each sequence."""
        return run_packed(self.backbone, chunks.to(self.backbone.dtype), cu_chunks)

    def step(self, chunks: Tensor, caches: Sequence[DynamicCache]) -> Tensor:
        """One more chunk for each of S sequences, [S, d_core] to [S, d_core]; each has a cache of its own."""
        outputs = []
        for row, cache in zip(chunks.to(self.backbone.dtype), caches, strict=True):
            out = self.backbone(inputs_embeds=row[None, None], past_key_values=cache, use_cache=True)
            outputs.append(out.last_hidden_state[0, 0])
        return torch.stack(outputs) if outputs else chunks

    def empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self.backbone.config)
