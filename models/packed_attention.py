"""Causal attention inside each sequence of a packed batch, and of one more row of each of several sequences."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Sequence after sequence, in fp32 at least: on the CPU the bf16 kernel's backward takes three times as long.

    Args:
        query, key, value: [1, heads, T, head_dim]; keys and values may have fewer heads.
        cu_seqlens: int32 [S+1].
        scaling: of the logits.
        window: rows that each row sees, itself among them; None for all before it. No mask is larger than
            [window, 2 window], whatever the length.

    Returns:
        [1, T, heads, head_dim] in the query's dtype.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    with torch.autocast(query.device.type, enabled=False):
        parts = (
            tensor.to(torch.promote_types(tensor.dtype, torch.float32)).split(lengths, 2)
            for tensor in (query, key, value)
        )
        outputs = [_attend(q, k, v, scaling, window) for q, k, v in zip(*parts, strict=True) if q.shape[2]]
        return torch.cat(outputs or [query], dim=2).transpose(1, 2).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One sequence, [1, heads, L, head_dim]; beyond the first window, blocks of as many queries see two blocks each."""
    rows = query.shape[2]
    if window is None or rows <= window:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=rows > 1, enable_gqa=True)
    first = _attend(query[:, :, :window], key[:, :, :window], value[:, :, :window], scaling, None)
    query, key, value = (F.pad(tensor, (0, 0, 0, -rows % window)) for tensor in (query, key, value))
    queries = query[0, :, window:].unflatten(1, (-1, window)).transpose(0, 1)  # [blocks, heads, window, head_dim]
    keys, values = (tensor[0].unfold(1, 2 * window, window).permute(1, 0, 3, 2) for tensor in (key, value))  # views
    place = torch.arange(2 * window, device=query.device)
    behind = place[window:, None] - place  # how far back a key lies
    seen = (behind >= 0) & (behind < window)
    rest = F.scaled_dot_product_attention(queries, keys, values, seen, scale=scaling, enable_gqa=True)
    return torch.cat([first, rest.transpose(0, 1).flatten(1, 2)[None]], dim=2)[:, :, :rows]


def attend_in_one_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    longest: int,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """As :func:`attend_by_sequence`, all sequences in one call of CUDA's flash attention.

    It takes 16-bit inputs: float32 ones are rounded to bf16.

    Args:
        longest: at least the rows of the longest sequence.
    """
    from torch.nn.attention.varlen import varlen_attn

    half = value.dtype if value.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    q, k, v = (tensor[0].transpose(0, 1).to(half) for tensor in (query, key, value))  # [T, heads, head_dim]
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest,
        scale=scaling, window_size=(window - 1 if window else -1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return cast(Tensor, out)[None].to(query.dtype)


def attend_to_cache(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float | None = None) -> Tensor:
    """One query for each of S sequences, [S, heads, 1, head_dim], to [S, 1, heads, head_dim].

    The query heads that share keys are the rows of one product, so that keys need not be repeated.

    Args:
        key, value: [S, key heads, L, head_dim].
        mask: bool [S, 1, 1, L], which keys are seen.
    """
    sequences, heads, _, head_dim = query.shape
    grouped = query.view(sequences, key.shape[1], heads // key.shape[1], head_dim)
    out = F.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return out.reshape(sequences, 1, heads, head_dim)
