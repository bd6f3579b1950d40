"""A sequence behind a packed batch, so that there are always many rows: with few, matrix libraries round otherwise."""

from collections.abc import Sequence

import torch
from torch import Tensor

import bytekernels
from bytekernels import BOS

PADDING = bytes([BOS] * 64)  # each byte a chunk of its own: the core too has many rows


def pack_with_padding(sequences: Sequence[bytes], device: torch.device) -> tuple[Tensor, Tensor]:
    """S sequences, BOS put before each, and the padding behind them: ids uint8 [T], cu_seqlens int32 [S+2]."""
    return bytekernels.pack_bytes([*sequences, PADDING[1:]], device=device)
