"""Longest suffixes in plain PyTorch: the specification. All bytes walk the tree of reversed strings at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from bytekernels.ragged import positions
from bytekernels.trie import child_of


def longest_suffix(
    ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None, edges: Tensor, children: Tensor, string_ids: Tensor
) -> Tensor:
    position = positions(cu_seqlens, ids.shape[0])
    rows = torch.arange(ids.shape[0], device=ids.device) if rows is None else rows.to(torch.int64)
    return _longest(position[rows] + 1, lambda walks, depth: ids[rows[walks] - depth], edges, string_ids)


def longest_suffix_step(
    ids: Tensor,
    active: Tensor | None,
    recent: Tensor,
    counts: Tensor,
    edges: Tensor,
    children: Tensor,
    string_ids: Tensor,
) -> Tensor:
    taken = torch.arange(ids.shape[0], device=ids.device) if active is None else active.nonzero().flatten()
    slots = recent.shape[1]
    newest = counts.to(torch.int64)  # the position of the byte that is taken
    recent[taken, newest[taken] % slots] = ids[taken]
    counts[taken] += 1
    held = torch.zeros_like(newest)
    held[taken] = counts[taken].clamp(max=slots).to(torch.int64)
    return _longest(held, lambda walks, depth: recent[walks, (newest[walks] - depth) % slots], edges, string_ids)


def _longest(held: Tensor, byte_before: Callable[[Tensor, int], Tensor], edges: Tensor, string_ids: Tensor) -> Tensor:
    """The id of the longest string that each of several walks meets: int32 [R].

    Args:
        held: int64 [R], the bytes of each walk.
        byte_before: of (int64 [n], depth), the byte so many before the newest of each of these walks.
    """
    longest = torch.full_like(held, -1, dtype=torch.int32)
    walks = held.nonzero().flatten()  # those that go on
    node = torch.zeros_like(walks, dtype=torch.int32)
    depth = 0
    while walks.numel():
        node = child_of(edges, node, byte_before(walks, depth))
        walks, node = walks[node >= 0], node[node >= 0]
        found = string_ids[node]
        longest[walks] = torch.where(found >= 0, found, longest[walks])
        depth += 1
        inside = held[walks] > depth
        walks, node = walks[inside], node[inside]
    return longest
