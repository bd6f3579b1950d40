"""FLOPs and bytes of the mixer: T rows (bytes), H heads of P in G groups, N values of state, K taps, S sequences.

Convolution, scan and norm hand each other their rows through memory, so the mixer must do what its parts must. With a
table the convolution reads 256 rows in place of T, and z and dt are gathered.
"""

import torch

from bytekernels.byte_table import roofline as table_room
from bytekernels.conv import roofline as conv_room
from bytekernels.norm import roofline as norm_room
from bytekernels.roofline import Work
from bytekernels.ssd import roofline as ssd_room


def mamba2_mixer(
    rows: int,
    heads: int,
    headdim: int,
    d_state: int,
    groups: int,
    taps: int,
    sequences: int,
    dtype: torch.dtype,
    *,
    table: bool = False,
) -> Work:
    """The convolution, the scan without z and the gated norm."""
    inner, channels = _widths(heads, headdim, d_state, groups)
    conv = conv_room.byte_conv1d if table else conv_room.causal_conv1d
    scan = ssd_room.ssd_scan(rows, heads, headdim, d_state, groups, sequences, dtype)
    work = conv(rows, channels, taps, sequences, dtype) + scan + norm_room.gated_rms_norm(rows, inner, dtype)
    return work + _gathered(rows, inner, heads, dtype) if table else work


def mamba2_mixer_backward(
    rows: int,
    heads: int,
    headdim: int,
    d_state: int,
    groups: int,
    taps: int,
    sequences: int,
    dtype: torch.dtype,
    *,
    table: bool = False,
) -> Work:
    """The three backward passes; with a table z and dt are gathered again, and three gradients summed by byte."""
    inner, channels = _widths(heads, headdim, d_state, groups)
    conv = conv_room.causal_conv1d_backward(rows, channels, taps, sequences, dtype)
    scan = ssd_room.ssd_scan_backward(rows, heads, headdim, d_state, groups, sequences, dtype)
    work = conv + scan + norm_room.gated_rms_norm_backward(rows, inner, dtype)
    if not table:
        return work
    summed = table_room.byte_table_backward(rows, inner + channels + heads, dtype)
    return work + _gathered(rows, inner, heads, dtype) + summed


def mamba2_mixer_step(
    sequences: int, heads: int, headdim: int, d_state: int, groups: int, taps: int, dtype: torch.dtype
) -> Work:
    """A row of zxbcdt for each sequence in, an output out; the float32 states read and written, float32 parameters.

    ``sequences`` are those that are active: of others next to nothing is moved. Of the ring K-1 slots are read and one
    is written. FLOPs: the state's decay, inflow and sum (5 a value), the taps (2 each).
    """
    inner, channels = _widths(heads, headdim, d_state, groups)
    states = 2 * inner * d_state + taps * channels + 2 * heads
    rows = (2 * inner + channels + heads) * dtype.itemsize
    parameters = channels * (taps + 1) + 3 * heads + inner
    flops = 5 * inner * d_state + 2 * taps * channels
    return Work(sequences * flops, sequences * (4 * states + rows) + 4 * parameters)


def _widths(heads: int, headdim: int, d_state: int, groups: int) -> tuple[int, int]:
    """H*P and C."""
    return heads * headdim, heads * headdim + 2 * groups * d_state


def _gathered(rows: int, inner: int, heads: int, dtype: torch.dtype) -> Work:
    return table_room.byte_table(rows, inner, dtype) + table_room.byte_table(rows, heads, dtype)
