"""What longest suffixes need to know of a text that comes byte by byte: its newest bytes."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bytekernels.ragged import lengths_of
from bytekernels.trie import ByteTrie


@dataclass
class SuffixState:
    """What :func:`bytekernels.longest_suffix_step` updates in place.

    Attributes:
        recent: uint8 [S, L], a ring of L bytes, the length of the longest string: byte i of a sequence is in slot
            ``i mod L``.
        counts: int32 [S], the bytes so far. A sequence begins anew where its count is set to 0.
    """

    recent: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, sequences: int, trie: ByteTrie) -> Self:
        """The state of S sequences that have not begun, on the trie's device."""
        recent = torch.zeros(sequences, trie.depth, device=trie.edges.device, dtype=torch.uint8)
        return cls(recent, torch.zeros(sequences, device=trie.edges.device, dtype=torch.int32))

    @classmethod
    def after(cls, ids: Tensor, cu_seqlens: Tensor, trie: ByteTrie) -> Self:
        """The state from which steps continue a packed text, ids uint8 [T] cut by cu_seqlens int32 [S+1]."""
        counts, slots = lengths_of(cu_seqlens), trie.depth
        slot = torch.arange(slots, device=ids.device)
        newest = counts[:, None].to(torch.int64) - 1
        position = newest - (newest - slot) % slots  # the last one of each slot: [S, L]
        recent = torch.zeros(position.shape, device=ids.device, dtype=torch.uint8)
        held = position >= 0
        recent[held] = ids[(cu_seqlens[:-1, None] + position)[held]]
        return cls(recent, counts)
