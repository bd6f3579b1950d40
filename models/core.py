"""The core: the teacher's own transformer, run over packed chunks."""

import inspect
from collections.abc import Callable
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, PreTrainedModel

from bytekernels.ragged import positions
from models.chunk_cache import CacheStep, ChunkCache
from models.config import ByteLMConfig
from models.packed_attention import attend_by_sequence, attend_in_one_call, attend_to_cache

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
    step: CacheStep | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a packed batch, for transformers' ``AttentionInterface``.

    Args:
        module: the attention module (unused; part of the interface).
        query, key, value: [1, heads, M, head_dim] packed, or with ``step`` [S, heads, 1, head_dim] queries and keys and
            values that the cache gave.
        attention_mask: always None: no M x M mask is ever made.
        scaling: of the logits.
        dropout: not supported while packed; must be 0.
        sliding_window: keys further back than this are not seen.
        softcap: not supported.
        cu_chunks: int32 [S+1], or None with ``step``.
        longest: rows of the longest sequence, which CUDA's kernel asks for.
        step: one more chunk for each of S sequences, and which of the keys each sees.

    Returns:
        [1, M, heads, head_dim], or [S, 1, heads, head_dim] with ``step``, and None.

    Raises:
        ValueError: dropout or soft-capping is asked for.
    """
    if dropout or softcap:
        raise ValueError(f"packed attention has neither dropout nor softcap, got dropout={dropout}, softcap={softcap}")
    if step is not None:
        return attend_to_cache(query, key, value, step.mask(sliding_window), scaling=scaling), None
    if cu_chunks is None:
        raise ValueError("packed attention needs cu_chunks, the chunks' offsets, or step: run it through run_packed")
    if query.device.type == "cuda":
        return attend_in_one_call(
            query, key, value, cu_chunks, longest=longest, scaling=scaling, window=sliding_window
        ), None
    return attend_by_sequence(query, key, value, cu_chunks, scaling=scaling, window=sliding_window), None


AttentionInterface.register(ATTENTION, packed_attention)


@remembered
def cache_argument(forward: Callable[..., Any]) -> str:
    """What a backbone's ``forward`` calls its cache: ``cache``, or ``past_key_values`` in older transformers."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def run_packed(
    backbone: PreTrainedModel, embeddings: Tensor, cu_chunks: Tensor, cache: ChunkCache | None = None
) -> Tensor:
    """Run a transformer over packed sequences.

    Args:
        backbone: a model without head that accepts ``inputs_embeds``, set to :data:`ATTENTION` (:func:`use_packed`).
        embeddings: [M, d_core].
        cu_chunks: int32 [S+1].
        cache: an empty one, which then holds the sequences' keys and values.

    Returns:
        [M, d_core], the last hidden state (after the model's last norm).
    """
    if embeddings.shape[0] == 0:
        return embeddings
    longest = int((cu_chunks[1:] - cu_chunks[:-1]).max())
    if cache is not None:
        cache.begin_prefill(cu_chunks, embeddings.shape[0], longest)
    return backbone(
        inputs_embeds=embeddings[None],
        position_ids=positions(cu_chunks, embeddings.shape[0])[None],
        cu_chunks=cu_chunks,
        longest=longest,
        use_cache=cache is not None,
        **{cache_argument(type(backbone).forward): cache},
    ).last_hidden_state[0]


def use_packed(model: PreTrainedModel) -> PreTrainedModel:
    """Set a transformers model to packed attention, and return it."""
    model.set_attn_implementation(ATTENTION)
    return model


class Core(nn.Module):
    """The teacher's transformer without embeddings, over chunk embeddings."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        # In the dtype of the parts beside it, whatever the teacher's own configuration says of its file.
        self.backbone = use_packed(AutoModel.from_config(config.core_config(), dtype=torch.get_default_dtype()))
        self.backbone.set_input_embeddings(nn.Identity())  # chunks come as embeddings

    def forward(self, chunks: Tensor, cu_chunks: Tensor) -> Tensor:
        """[M, d_core] to [M, d_core], causal inside each sequence."""
        return run_packed(self.backbone, chunks.to(self.backbone.dtype), cu_chunks)

    def prefill(self, chunks: Tensor, cu_chunks: Tensor, cache: ChunkCache) -> Tensor:
        """As :meth:`forward`, and the empty cache then holds every sequence's keys and values."""
        if chunks.shape[0] == 0:
            return chunks
        return run_packed(self.backbone, chunks.to(self.backbone.dtype), cu_chunks, cache)

    def step(self, chunks: Tensor, cache: ChunkCache, active: Tensor) -> Tensor:
        """One more chunk for each active sequence.

        Args:
            chunks: [S, d_core].
            cache: updated in place.
            active: bool [S]; the rows of the others mean nothing, and the cache does not keep them.

        Returns:
            [S, d_core].

        Raises:
            ValueError: an active sequence has as many chunks as the core has positions.
        """
        step = cache.begin_step(active)
        out = self.backbone(
            inputs_embeds=chunks.to(self.backbone.dtype)[:, None],
            position_ids=cache.lengths[:, None],
            use_cache=True,
            step=step,
            **{cache_argument(type(self.backbone).forward): cache},
        ).last_hidden_state[:, 0]
        cache.end_step(active)
        return out

    def empty_cache(self, sequences: int) -> ChunkCache:
        config, parameter = self.backbone.config, next(self.backbone.parameters())
        return ChunkCache(sequences, config.num_hidden_layers, self.max_chunks, parameter.device)

    @property
    def max_chunks(self) -> int:
        """Positions that the core has: the most chunks of a sequence."""
        return self.backbone.config.max_position_embeddings
