"""Routing in plain PyTorch: the specification.

``prob[t] = (1 - cos(q[t], k[t+1])) / 2`` for chunk ends, one byte ahead; ``(1 - cos(q[t-1], k[t])) / 2`` for chunk
starts (Hwang et al. 2025, arXiv 2507.07955, equation 4).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bytekernels.ragged import accumulation_dtype, segment_ids

EPS = 1e-12  # added to squared norms: the cosine with a zero row is 0, and its gradient finite


def boundary_probability(q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool) -> Tensor:
    """Probability of a boundary at each byte: [T], 1 at the last (lookahead) or first byte of each sequence."""
    q, k = _pairs(q, k, lookahead)
    cosine = (q * k).sum(-1) * _inverse_norm(q) * _inverse_norm(k)
    return torch.where(_forced(cu_seqlens, q.shape[0], lookahead), 1.0, ((1 - cosine) / 2).clamp(0, 1))


def route_backward(dprob: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool) -> list[Tensor]:
    """Gradients of q and k: with the unit rows a and b, dcos/dq = (b - cos a) / |q|; nothing at forced bytes."""
    left, right = _pairs(q, k, lookahead)
    scale_left, scale_right = _inverse_norm(left)[:, None], _inverse_norm(right)[:, None]
    a, b = left * scale_left, right * scale_right
    cosine = (a * b).sum(-1, keepdim=True)
    silent = _forced(cu_seqlens, q.shape[0], lookahead)[:, None] | (cosine.abs() > 1)
    dcosine = torch.where(silent, 0.0, -dprob[:, None] / 2)
    dleft = dcosine * scale_left * (b - cosine * a)
    dright = dcosine * scale_right * (a - cosine * b)
    dq, dk = (dleft, dright.roll(1, 0)) if lookahead else (dleft.roll(-1, 0), dright)
    return [dq.to(q.dtype), dk.to(k.dtype)]


def _pairs(q: Tensor, k: Tensor, lookahead: bool) -> tuple[Tensor, Tensor]:
    """The rows of q and k that are compared at each byte. Pairs of two sequences fall on forced bytes."""
    wide = accumulation_dtype(q.dtype)
    q, k = q.to(wide), k.to(wide)
    return (q, k.roll(-1, 0)) if lookahead else (q.roll(1, 0), k)


def _inverse_norm(x: Tensor) -> Tensor:
    return (x.square().sum(-1) + EPS).rsqrt()


def _forced(cu_seqlens: Tensor, total: int, lookahead: bool) -> Tensor:
    """Bytes with no neighbour to compare with: the last or the first of each sequence."""
    edges = torch.zeros(total + 1, dtype=torch.bool, device=cu_seqlens.device)
    edges[cu_seqlens.to(torch.int64)] = True
    return edges[1:] if lookahead else edges[:-1]


def chunk_layout(boundary: Tensor, cu_seqlens: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.zeros(boundary.shape[0] + 1, dtype=torch.int32, device=boundary.device)
    torch.cumsum(boundary, 0, dtype=torch.int32, out=counts[1:])
    cu_chunks = counts[cu_seqlens.to(torch.int64)]
    newest = counts[1:] - 1
    first = cu_chunks[segment_ids(cu_seqlens, boundary.shape[0])]
    chunk_of = torch.where(newest >= first, newest, -1)
    index = boundary.nonzero().flatten().to(torch.int32)
    if capacity is not None:
        index = F.pad(index[:capacity], (0, max(0, capacity - index.shape[0])), value=-1)
    return chunk_of, index, cu_chunks


def route(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, required: Tensor | None, lookahead: bool, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    prob = boundary_probability(q, k, cu_seqlens, lookahead)
    boundary = prob >= 0.5 if required is None else (prob >= 0.5) | required
    return prob, boundary, *chunk_layout(boundary, cu_seqlens, capacity)


def gather_chunks(h: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    """Row index[m] of h for each chunk; index -1 takes the row of zeros that is put last."""
    return F.pad(h, (0, 0, 0, 1))[index.to(torch.int64)]


def gather_chunks_backward(de: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    """Scatter of de's rows to the bytes that they came from; a byte has at most one chunk, so nothing is summed."""
    real = index >= 0
    return de.new_zeros(chunk_of.shape[0], de.shape[1]).index_copy_(0, index[real].to(torch.int64), de[real])
