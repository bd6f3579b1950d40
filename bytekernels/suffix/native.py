"""Longest suffixes through the extension: csrc/suffix.h."""

from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array, threads


def longest_suffix(
    ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None, edges: Tensor, children: Tensor, string_ids: Tensor
) -> Tensor:
    found = edges.new_empty(ids.shape if rows is None else rows.shape)
    _C.longest_suffix(
        array(ids.contiguous()),
        array(cu_seqlens.contiguous()),
        None if rows is None else array(rows.contiguous()),
        (array(edges), array(children), array(string_ids)),
        array(found),
        threads(),
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
    found = edges.new_empty(ids.shape)
    _C.longest_suffix_step(
        array(ids.contiguous()),
        None if active is None else array(active.contiguous()),
        array(recent),
        array(counts),
        (array(edges), array(children), array(string_ids)),
        array(found),
        threads(),
    )
    return found
