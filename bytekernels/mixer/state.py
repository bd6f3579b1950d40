"""What a mixer remembers of its sequences between two bytes."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


class MixerStates(NamedTuple):
    """What :func:`bytekernels.mamba2_mixer` begins with and ends with.

    Attributes:
        conv: [S, C, K-1], the convolution's rows before, oldest first.
        ssm: float32 (float64 for float64) [S, H, P, N], the scan's states.
    """

    conv: Tensor
    ssm: Tensor


@dataclass
class MixerState:
    """What :func:`bytekernels.mamba2_mixer_step` updates in place.

    The convolution's rows lie in a ring of K slots, K-1 of which are read at a step: the row that came j bytes ago is
    in slot ``(position - j) mod K``, and the new one goes into slot ``position``, which nobody reads at that step. So
    the heads that share B and C need not wait for each other. Each head counts by itself.

    Attributes:
        conv: float32 (float64 for float64) [S, C, K], the ring.
        position: int32 [S, H], the slot that the next row goes into; equal for all heads between two steps.
        ssm: float32 (float64 for float64) [S, H, P, N], the scan's states.
    """

    conv: Tensor
    position: Tensor
    ssm: Tensor

    @classmethod
    def empty(
        cls,
        sequences: int,
        channels: int,
        taps: int,
        heads: int,
        head_dim: int,
        state_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The state of S sequences that have not begun; dtype is float32, or float64 for float64 rows."""
        return cls(
            torch.zeros(sequences, channels, taps, device=device, dtype=dtype),
            torch.zeros(sequences, heads, device=device, dtype=torch.int32),
            torch.zeros(sequences, heads, head_dim, state_size, device=device, dtype=dtype),
        )

    @classmethod
    def after(cls, states: MixerStates) -> Self:
        """The state from which steps continue a forward pass; shares no memory with its final states."""
        ssm = states.ssm.clone(memory_format=torch.contiguous_format)
        conv = torch.nn.functional.pad(states.conv.to(ssm.dtype), (1, 0))  # slot 0 is the next row's
        return cls(conv, torch.zeros(ssm.shape[:2], device=ssm.device, dtype=torch.int32), ssm)
