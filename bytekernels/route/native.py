"""Routing through the extension: csrc/route.h. Float32 and bfloat16 on the CPU; rows are gathered in any dtype."""

import torch
from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array, fresh, rows, threads


def route(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, required: Tensor | None, lookahead: bool, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, width = q.shape
    prob = q.new_empty(total, dtype=torch.float32)
    boundary = q.new_empty(total, dtype=torch.bool)
    layout = _empty_layout(boundary, cu_seqlens, capacity)
    count = _C.route(
        q.dtype == torch.bfloat16,
        total,
        width,
        array(cu_seqlens.contiguous()),
        lookahead,
        rows(q),
        rows(k),
        None if required is None else array(required.contiguous()),
        array(prob),
        array(boundary),
        tuple(map(array, layout)),
        threads(),
    )
    return prob, boundary, *_cut(layout, count, capacity)


def route_backward(dprob: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool) -> list[Tensor]:
    total, width = q.shape
    dq, dk = fresh(q), fresh(k)
    _C.route_backward(
        q.dtype == torch.bfloat16,
        total,
        width,
        array(cu_seqlens.contiguous()),
        lookahead,
        array(dprob.float().contiguous()),
        rows(q),
        rows(k),
        array(dq),
        array(dk),
        threads(),
    )
    return [dq, dk]


def chunk_layout(boundary: Tensor, cu_seqlens: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    layout = _empty_layout(boundary, cu_seqlens, capacity)
    count = _C.chunk_layout(
        len(boundary),
        array(cu_seqlens.contiguous()),
        array(boundary.contiguous()),
        tuple(map(array, layout)),
        threads(),
    )
    return _cut(layout, count, capacity)


def gather_chunks(h: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    out = fresh(h, (len(index), h.shape[1]))
    address, size, stride, owner = rows(h)
    source = (address, size, stride * h.element_size(), owner)
    _C.gather_chunks(len(h), _row_bytes(h), array(index.contiguous()), source, array(out), threads())
    return out


def gather_chunks_backward(de: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    dh = fresh(de, (len(chunk_of), de.shape[1]))
    _C.gather_chunks_backward(
        _row_bytes(de),
        array(index.contiguous()),
        array(chunk_of.contiguous()),
        array(de.contiguous()),
        array(dh),
        threads(),
    )
    return dh


def _empty_layout(boundary: Tensor, cu_seqlens: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """chunk_of, index with room for as many chunks as there can be, and cu_chunks."""
    total = len(boundary)
    room = total if capacity is None else capacity
    return (
        boundary.new_empty(total, dtype=torch.int32),
        boundary.new_empty(room, dtype=torch.int32),
        cu_seqlens.new_empty(cu_seqlens.shape),
    )


def _cut(layout: tuple[Tensor, Tensor, Tensor], count: int, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    chunk_of, index, cu_chunks = layout
    return chunk_of, index[:count].clone() if capacity is None else index, cu_chunks


def _row_bytes(x: Tensor) -> int:
    return x.shape[1] * x.element_size()
