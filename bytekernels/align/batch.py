"""An aligned batch and the memory that it lies in: one arena, so that it goes to a device in one copy."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of each section of the arena

DTYPES = {
    "ids": torch.uint8,
    "cu_seqlens": torch.int32,
    "token_end": torch.bool,
    "token_ids": torch.int64,
    "token_cu": torch.int32,
    "targets": torch.int64,
}


class AlignedBatch(NamedTuple):
    """S sequences, packed: T bytes and M tokens. Made by :func:`bytekernels.align_pack`, in one allocation.

    Attributes:
        ids: uint8 [T], each sequence begins with BOS and may end with EOS.
        cu_seqlens: int32 [S+1], where sequences begin among the bytes.
        token_end: bool [T], the byte ends a token; true at BOS and EOS.
        token_ids: int64 [M], the tokens in the order of their ends, with those of BOS and EOS.
        token_cu: int32 [S+1], where sequences begin among the tokens.
        targets: int64 [T], the next byte, + 256 where it ends a token; -100 on each sequence's last. Or None.
    """

    ids: Tensor
    cu_seqlens: Tensor
    token_end: Tensor
    token_ids: Tensor
    token_cu: Tensor
    targets: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "AlignedBatch":
        """The batch on another device, in one copy and one allocation there; itself where it is on that one already.

        Tensors that no longer lie in one arena (some were replaced, or pinned one by one) are copied one by one.

        Args:
            device: where it goes.
            non_blocking: return before the copy is done, where the batch is pinned. Torch then keeps the arena from
                being used again before that.
        """
        layout = Layout.of(self)
        if not layout.holds(self):
            moved = [None if t is None else t.to(device, non_blocking=non_blocking) for t in self]
            return AlignedBatch(*moved)  # type: ignore[arg-type]
        arena = self.ids.as_strided((layout.size,), (1,))
        there = arena.to(device, non_blocking=non_blocking)
        return self if there is arena else layout.batch(there)


@dataclass(frozen=True)
class Layout:
    """Where the sections of a batch of T ``rows``, M ``tokens`` and S ``sequences`` begin in its arena, in bytes."""

    rows: int
    tokens: int
    sequences: int
    targets: bool

    @classmethod
    def of(cls, batch: AlignedBatch) -> "Layout":
        return cls(len(batch.ids), len(batch.token_ids), len(batch.cu_seqlens) - 1, batch.targets is not None)

    @cached_property
    def sections(self) -> dict[str, tuple[int, int]]:
        """Begin and end of each section, in bytes, in the arena's order."""
        offsets = self.sequences + 1
        lengths = {
            "ids": self.rows,
            "cu_seqlens": offsets,
            "token_end": self.rows,
            "token_ids": self.tokens,
            "token_cu": offsets,
        } | ({"targets": self.rows} if self.targets else {})
        sections, end = {}, 0
        for name, length in lengths.items():
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            end = begin + length * DTYPES[name].itemsize
            sections[name] = (begin, end)
        return sections

    @property
    def size(self) -> int:
        """Bytes of the arena."""
        return max(end for _, end in self.sections.values())

    def batch(self, arena: Tensor) -> AlignedBatch:
        """The sections of an arena, uint8 [size], as a batch."""
        views: dict[str, Tensor | None] = {"targets": None}
        for name, (begin, end) in self.sections.items():
            views[name] = arena[begin:end].view(DTYPES[name])
        return AlignedBatch(**views)  # type: ignore[arg-type]

    def holds(self, batch: AlignedBatch) -> bool:
        """Whether the batch's tensors lie in one arena as :meth:`batch` lays them."""
        first = batch.ids.storage_offset()
        for name, (begin, _) in self.sections.items():
            tensor = getattr(batch, name)
            shared = tensor.device == batch.ids.device
            shared &= tensor.untyped_storage().data_ptr() == batch.ids.untyped_storage().data_ptr()
            at = tensor.storage_offset() * tensor.element_size() - first
            if not shared or at != begin or tensor.dtype != DTYPES[name] or not tensor.is_contiguous():
                return False
        return True
