"""Longest suffixes in plain PyTorch: the specification. All bytes walk the tree of reversed strings at once."""

import torch
from torch import Tensor

from bytekernels.ragged import positions
from bytekernels.trie import child_of


def longest_suffix(ids: Tensor, cu_seqlens: Tensor, edges: Tensor, string_ids: Tensor) -> Tensor:
    position = positions(cu_seqlens, ids.shape[0])
    longest = torch.full_like(ids, -1, dtype=torch.int32)
    rows = torch.arange(ids.shape[0], device=ids.device)  # the bytes whose walk goes on
    node = torch.zeros_like(longest)
    depth = 0
    while rows.numel():
        node = child_of(edges, node, ids[rows - depth])
        rows, node = rows[node >= 0], node[node >= 0]
        found = string_ids[node]
        longest[rows] = torch.where(found >= 0, found, longest[rows])
        depth += 1
        inside = position[rows] >= depth
        rows, node = rows[inside], node[inside]
    return longest
