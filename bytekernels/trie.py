"""A vocabulary as a tree of bytes in flat arrays, which tensors and native code walk alike."""

import copy
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

NO_NODE = -1
_ROOT_EDGE = -(2**31)  # below every edge, so that the edges ascend from the root on


class ByteTrie:
    """The prefixes of a list of strings, numbered breadth first and within a level as sorted byte strings.

    Node 0 is the empty string. A vocabulary entry that is empty is no string (a special token, a gap in the ids).

    Args:
        strings: the bytes of each id.

    Attributes:
        edges: int32 [N], ``256 * parent + byte`` of each node, ascending; -2^31 for the root.
        children: int32 [N+1], the children of node n are ``children[n]`` to ``children[n+1]``, in the order of bytes.
        ids: int32 [N], the smallest id whose string ends at each node, -1 if none.
        nodes: int32 [V], the node of each id's string, -1 for an empty entry.
        levels: the first node of each depth, and N.

    Raises:
        TypeError: an entry that is not bytes.
        ValueError: no string at all, or more prefixes than int32 edges can number (2^23).
    """

    edges: Tensor
    children: Tensor
    ids: Tensor
    nodes: Tensor
    levels: list[int]

    def __init__(self, strings: Sequence[bytes]) -> None:
        for index, string in enumerate(strings):
            if not isinstance(string, bytes):
                raise TypeError(f"strings must be bytes, got {type(string).__name__} at index {index}")
        text = np.frombuffer(b"".join(strings), np.uint8)
        length = np.array([len(string) for string in strings], np.int64)
        if not text.size:
            raise ValueError("strings must hold at least one that is not empty")
        offset = length.cumsum() - length
        node = np.zeros(len(strings), np.int64)
        edges, levels, total = [np.array([_ROOT_EDGE])], [0, 1], 1
        longer = length.nonzero()[0]  # ids whose strings go on below the nodes that were numbered so far
        while longer.size:
            depth = len(edges) - 1
            level, member = np.unique(node[longer] * 256 + text[offset[longer] + depth], return_inverse=True)
            node[longer] = total + member
            total += len(level)
            edges.append(level)
            levels.append(total)
            longer = longer[length[longer] > depth + 1]
        if total > 2**23:
            raise ValueError(f"strings must have at most {2**23} prefixes, got {total}")
        flat = np.concatenate(edges)
        node[length == 0] = NO_NODE
        ids = np.full(total, -1)
        backwards = length.nonzero()[0][::-1]
        ids[node[backwards]] = backwards
        children = 1 + np.searchsorted(flat[1:] >> 8, np.arange(total + 1))
        self.edges, self.children, self.ids, self.nodes = (
            torch.from_numpy(array.astype(np.int32)) for array in (flat, children, ids, node)
        )
        self.levels = levels

    def __len__(self) -> int:
        """V, the number of entries, empty ones included."""
        return self.nodes.shape[0]

    @property
    def depth(self) -> int:
        """The length of the longest string."""
        return len(self.levels) - 2

    def to(self, device: torch.device | str) -> Self:
        """The same tree on another device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        return moved

    def child(self, node: Tensor, byte: Tensor) -> Tensor:
        """The node below each node by each byte: int32, -1 where there is none or node is -1."""
        return child_of(self.edges, node, byte)


def child_of(edges: Tensor, node: Tensor, byte: Tensor) -> Tensor:
    """:meth:`ByteTrie.child` on the flat edges."""
    edge = node.to(torch.int32) * 256 + byte.to(torch.int32)
    place = torch.searchsorted(edges, edge).clamp(max=edges.shape[0] - 1)
    return torch.where((node >= 0) & (edges[place] == edge), place, NO_NODE).to(torch.int32)
