"""From chunks back to bytes in plain PyTorch: the specification.

``z_m = w_m c_m + (1 - w_m) z_{m-1}`` with w = 1 at the first chunk of a sequence, and ``u_t = z_{chunk_of[t]}``
(Hwang et al. 2025, arXiv 2507.07955, equations 5 to 9).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bytekernels.ragged import accumulation_dtype, lengths_of, positions, segment_ids


def _by_position(cu_chunks: Tensor, total: int) -> tuple[Tensor, list[int]]:
    """The chunks in order of their position in their sequence, longer sequences first, and how many are at each.

    The recurrence then runs over positions, all sequences at once: the chunks at one position follow, in order, the
    first of those at the position before.
    """
    order = lengths_of(cu_chunks).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    position = positions(cu_chunks, total)
    schedule = (position * len(order) + rank[segment_ids(cu_chunks, total)]).argsort()
    return schedule, torch.bincount(position).tolist()


def ema(chunks: Tensor, weight: Tensor, cu_chunks: Tensor) -> Tensor:
    """z [M, D]: the moving average of the chunks in each sequence."""
    schedule, counts = _by_position(cu_chunks, chunks.shape[0])
    weight = torch.where(_is_first(cu_chunks, chunks.shape[0]), 1.0, weight)[:, None]
    new = (weight * chunks)[schedule].split(counts)
    keep = (1 - weight)[schedule].split(counts)
    z = list(new[:1])
    for position in range(1, len(counts)):
        z.append(torch.addcmul(new[position], keep[position], z[-1][: counts[position]]))
    return torch.cat([*z, chunks[:0]])[schedule.argsort()]


def ema_backward(dz: Tensor, chunks: Tensor, weight: Tensor, cu_chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of chunks and weight: with g_m = dz_m + (1 - w_{m+1}) g_{m+1}, dc = w g and dw = <g, c - z_{m-1}>."""
    schedule, counts = _by_position(cu_chunks, chunks.shape[0])
    first = _is_first(cu_chunks, chunks.shape[0])
    wide_weight = torch.where(first, 1.0, weight)[:, None]
    keep = (1 - wide_weight)[schedule].split(counts)
    g = dz[schedule]
    parts = g.split(counts)
    for position in range(len(counts) - 1, 0, -1):
        parts[position - 1][: counts[position]].addcmul_(keep[position], parts[position])
    g = g[schedule.argsort()]
    previous = ema(chunks, weight, cu_chunks).roll(1, 0)
    dweight = torch.where(first, 0.0, (g * (chunks - previous)).sum(-1))
    return wide_weight * g, dweight


def _is_first(cu_chunks: Tensor, total: int) -> Tensor:
    return positions(cu_chunks, total) == 0


def dechunk(
    chunks: Tensor,
    chunk_of: Tensor,
    index: Tensor,
    cu_chunks: Tensor,
    weight: Tensor | None,
    null: Tensor | None,
    residual: Tensor | None,
    confidence: Tensor | None,
) -> Tensor:
    dtype = chunks.dtype if residual is None else torch.promote_types(chunks.dtype, residual.dtype)
    wide = accumulation_dtype(dtype)
    z = chunks.to(wide)
    if weight is not None:
        z, weight, cu_chunks = _held(z, weight.to(wide), cu_chunks)
        z = F.pad(ema(z, weight, cu_chunks), (0, 0, 0, chunks.shape[0] - z.shape[0]))
    before = z.new_zeros(1, z.shape[1]) if null is None else null.to(wide)[None]
    lost = torch.full_like(before, torch.nan)
    u = F.embedding(_row_of(chunk_of, chunks.shape[0]), torch.cat([z, before, lost]))  # [T, D]
    if confidence is not None:
        confidence = confidence.to(wide)
        u = u * (1 + (confidence - confidence.detach()))[:, None]  # 1 exactly, with the gradient of confidence
    if residual is not None:
        u = u + residual
    return u.to(dtype)


def dechunk_backward(
    du: Tensor,
    chunks: Tensor,
    chunk_of: Tensor,
    index: Tensor,
    cu_chunks: Tensor,
    weight: Tensor | None,
    null: Tensor | None,
    confidence: Tensor | None,
) -> list[Tensor]:
    """Gradients of chunks, weight, null and confidence, without those that are None. The residual's is du."""
    wide = accumulation_dtype(du.dtype)
    count = chunks.shape[0]
    gradient = du.to(wide)
    rows = _row_of(chunk_of, count)
    sums = torch.ops.aten.embedding_dense_backward(gradient, rows, count + 2, -1, False)
    dchunks, dnull = sums[:count], sums[count]
    dweight = None
    if weight is not None:
        held, held_weight, cu_held = _held(chunks.to(wide), weight.to(wide), cu_chunks)
        room = count - held.shape[0]
        dchunks, dweight = ema_backward(dchunks[: held.shape[0]], held, held_weight, cu_held)
        dchunks, dweight = F.pad(dchunks, (0, 0, 0, room)), F.pad(dweight, (0, room))
    dconfidence = None
    if confidence is not None:
        u = dechunk(chunks.to(wide), chunk_of, index, cu_chunks, weight, null, None, None)
        dconfidence = (gradient * u).sum(-1)
    pairs = [(dchunks, chunks), (dweight, weight), (dnull, null), (dconfidence, confidence)]
    return [value.to(like.dtype, copy=True) for value, like in pairs if value is not None and like is not None]


def _held(chunks: Tensor, weight: Tensor, cu_chunks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks that the batch has and that have found room, their weights, and their offsets."""
    count = min(int(cu_chunks[-1]), chunks.shape[0])
    return chunks[:count], weight[:count], cu_chunks.clamp(max=count)


def _row_of(chunk_of: Tensor, count: int) -> Tensor:
    """The row of each byte in the chunks followed by null and the row of those that found no room."""
    return torch.where(chunk_of < 0, count, torch.where(chunk_of >= count, count + 1, chunk_of))
