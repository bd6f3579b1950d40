"""What the rooms' cases are made of: sizes, tensors on the meta device, names."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Case = Callable[[torch.dtype], object]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Batch:
    """T bytes, M chunks and S sequences."""

    bytes: int
    chunks: int
    sequences: int

    def rows(self, width: int, dtype: torch.dtype) -> Tensor:
        return empty(self.bytes, width, dtype=dtype)

    def flags(self) -> Tensor:
        return empty(self.bytes, dtype=torch.bool)

    def cu(self) -> Tensor:
        return empty(self.sequences + 1, dtype=torch.int32)

    def index(self) -> Tensor:
        return empty(self.chunks, dtype=torch.int32)

    def chunk_of(self) -> Tensor:
        return empty(self.bytes, dtype=torch.int32)


EVEN = Batch(bytes=4096, chunks=1024, sequences=16)
ODD = Batch(bytes=4095, chunks=1023, sequences=1)  # Triton specialises 1 and multiples of 16; sizes must not be


def at_widths(cases: Callable[[int, Batch], dict[str, Case]], widths: tuple[int, ...]) -> dict[str, Case]:
    """The cases at each of the widths, and at the first once more with odd sizes."""
    named = {f"{name} D={width}": case for width in widths for name, case in cases(width, EVEN).items()}
    return named | {f"{name} D={widths[0]} odd": case for name, case in cases(widths[0], ODD).items()}
