"""Sequences behind a packed batch, so that there are always many rows: with few, matrix libraries round otherwise."""

from collections.abc import Sequence

import torch
from torch import Tensor

import bytekernels
from bytekernels import BOS

PADDING = bytes([BOS] * 64)  # each byte a chunk of its own: the core too has many rows


def pack_with_padding(
    sequences: Sequence[bytes], device: torch.device, *, most_chunks: int = len(PADDING)
) -> tuple[Tensor, Tensor]:
    """S sequences, BOS put before each, and the padding behind them.

    Args:
        sequences: bytes without BOS.
        device: of the result.
        most_chunks: positions that a core has which keeps keys and values of all but each sequence's last byte.

    Returns:
        ids uint8 [T] and cu_seqlens int32 [S+P+1], the padding cut into P sequences that have the positions; P = 1
        where there are 64 or none is given.
    """
    padding = [PADDING[at + 1 : at + 1 + most_chunks] for at in range(0, len(PADDING), most_chunks + 1)]
    return bytekernels.pack_bytes([*sequences, *padding], device=device)
