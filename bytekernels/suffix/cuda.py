"""Longest suffixes by the extension's CUDA kernels (csrc/cuda): one launch a call, on the current stream."""

from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array_on, where


def longest_suffix(
    ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None, edges: Tensor, children: Tensor, string_ids: Tensor
) -> Tensor:
    ids, cu_seqlens = ids.contiguous(), cu_seqlens.contiguous()
    rows = None if rows is None else rows.contiguous()
    found = edges.new_empty(ids.shape if rows is None else rows.shape)
    _C.cuda.longest_suffix(
        array_on(ids),
        array_on(cu_seqlens),
        None if rows is None else array_on(rows),
        (array_on(edges), array_on(children), array_on(string_ids)),
        array_on(found),
        *where(ids),
    )
    return found


def longest_suffix_step(
    ids: Tensor,
    active: Tensor | None,
    recent: Tensor,
    counts: Tensor,
    edges: Tensor,
    children: Tensor,
    string_ids: Tensor,
) -> Tensor:
    ids = ids.contiguous()
    active = None if active is None else active.contiguous()
    found = edges.new_empty(ids.shape)
    _C.cuda.longest_suffix_step(
        array_on(ids),
        None if active is None else array_on(active),
        array_on(recent),
        array_on(counts),
        (array_on(edges), array_on(children), array_on(string_ids)),
        array_on(found),
        *where(ids),
    )
    return found
