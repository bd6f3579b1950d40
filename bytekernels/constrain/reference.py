"""Chunk ends held to a vocabulary, in plain PyTorch: the specification. All sequences are walked at once."""

import torch
from torch import Tensor

from bytekernels.trie import child_of


def constrain_ends(
    ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, edges: Tensor, children: Tensor, string_ids: Tensor
) -> Tensor:
    ends = boundary.clone()
    row, last = cu_seqlens[:-1].long(), cu_seqlens[1:].long() - 1
    walks = row < last
    row, last = row[walks], last[walks]
    node = child_of(edges, torch.zeros_like(row), ids[row])  # of the open chunk's bytes
    while row.numel():
        following = ids[row + 1]
        longer = child_of(edges, node, following)
        is_string = (node >= 0) & (string_ids[node] >= 0)
        ends[row] = (longer < 0) | (boundary[row] & is_string)
        node = torch.where(ends[row], child_of(edges, torch.zeros_like(node), following), longer)
        walks = row + 1 < last
        row, last, node = row[walks] + 1, last[walks], node[walks]
    return ends
