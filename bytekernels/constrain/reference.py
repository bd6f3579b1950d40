"""Chunk ends held to a vocabulary, by dynamic programming: the specification, its loops in plain Python."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from bytekernels.trie import child_of

LONGEST_CHUNK = 63  # bytes
SUREST = 1e3  # a log-odds further from 0 counts as this
NO_STRING = 1e6  # what a chunk costs that is no string


def constrain_ends(ids: Tensor, cu_seqlens: Tensor, log_odds: Tensor, given: Tensor, *tree: Tensor) -> Tensor:
    edges, _, string_ids = tree
    is_string, reach = _choices(ids, cu_seqlens, edges, string_ids)
    worth = log_odds.nan_to_num(0.0, torch.inf, -torch.inf).clamp(-SUREST, SUREST).tolist()
    ends = torch.zeros_like(ids, dtype=torch.bool)
    for (begin, end), context in zip(pairwise(cu_seqlens.tolist()), given.tolist(), strict=True):
        if begin == end:
            continue
        open_from, first_end = begin, begin
        if context > 1:
            first_end = min(begin + context, end) - 1
            before, open_from = _best_ends(is_string, reach, worth, begin, first_end + 1, begin)
            ends[before] = True
        after, _ = _best_ends(is_string, reach, worth, open_from, end, first_end)
        ends[after] = True
        ends[end - 1] = worth[end - 1] >= 0
    return ends


def _choices(ids: Tensor, cu_seqlens: Tensor, edges: Tensor, string_ids: Tensor) -> tuple[list[list[bool]], list[int]]:
    """Of the chunks that may begin at each byte: which lengths less one are strings, and how long one may be."""
    rows = torch.arange(ids.shape[0], device=ids.device)
    stop = torch.repeat_interleave(cu_seqlens[1:].long(), cu_seqlens.diff().long())
    node, found = torch.zeros_like(rows), []
    reach = torch.zeros_like(rows)
    for length in range(LONGEST_CHUNK):
        inside = rows + length < stop
        following = child_of(edges, node, ids[(rows + length).clamp(max=max(ids.shape[0] - 1, 0))])
        node = torch.where(inside, following, -1).long()
        found.append((node >= 0) & (string_ids[node] >= 0))
        reach += node >= 0
    return torch.stack(found, 1).tolist(), reach.clamp(min=1).tolist()


def _best_ends(
    is_string: list[list[bool]], reach: list[int], worth: list[float], begin: int, end: int, first_end: int
) -> tuple[list[int], int]:
    """The rows that chunks end on, in the best way to cut rows ``begin`` to ``end``, and where its last chunk begins.

    That the last chunk ends is not said, and not counted; it costs what others do if it is no string. No other ends
    before ``first_end``. Of ways of the same worth the one with the longest last chunk is taken, and so on backwards.
    """
    best: dict[int, tuple[float, int]] = {begin: (0.0, begin)}  # by where a chunk begins: worth, where the last one did
    open_worth, open_from = -math.inf, begin
    for row in range(begin, end):
        if row not in best:
            continue
        so_far = best[row][0]
        for length in range(1, reach[row] + 1):
            string = is_string[row][length - 1]
            last = row + length - 1
            if first_end <= last < end - 1 and (string or length == reach[row]):
                value = (so_far if string else so_far - NO_STRING) + worth[last]
                if last + 1 not in best or value > best[last + 1][0]:
                    best[last + 1] = value, row
        if row + reach[row] >= end:
            value = so_far if is_string[row][end - row - 1] else so_far - NO_STRING
            if value > open_worth:
                open_worth, open_from = value, row
    ends, row = [], open_from
    while row > begin:
        ends.append(row - 1)
        row = best[row][1]
    return ends, open_from
