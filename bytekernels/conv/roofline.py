"""FLOPs and bytes of the convolution with a bias and without states: T rows (bytes) of C channels, K taps, S sequences.

Weight and bias are in float32. Activations are left out of the FLOPs, and final states of the bytes.
"""

import torch

from bytekernels.roofline import Work


def causal_conv1d(rows: int, channels: int, taps: int, sequences: int, dtype: torch.dtype) -> Work:
    """x, weight, bias and cu_seqlens in; y out. FLOPs: a multiplication and an addition for each tap."""
    return Work(
        2 * taps * rows * channels, 2 * rows * channels * dtype.itemsize + _parameters(channels, taps, sequences)
    )


def causal_conv1d_backward(rows: int, channels: int, taps: int, sequences: int, dtype: torch.dtype) -> Work:
    """dy, x, weight, bias and cu_seqlens in; dx, dweight and dbias out.

    FLOPs for each value: the sum of taps again, its transpose, the taps' share of dweight (2 a tap each), and dbias.
    """
    out = 4 * channels * (taps + 1)
    values = 3 * rows * channels * dtype.itemsize
    return Work((6 * taps + 1) * rows * channels, values + _parameters(channels, taps, sequences) + out)


def byte_conv1d(rows: int, channels: int, taps: int, sequences: int, dtype: torch.dtype) -> Work:
    """ids, the table, weight, bias and cu_seqlens in; y out."""
    taken = rows + 256 * channels * dtype.itemsize + _parameters(channels, taps, sequences)
    return Work(2 * taps * rows * channels, taken + rows * channels * dtype.itemsize)


def byte_conv1d_backward(rows: int, channels: int, taps: int, sequences: int, dtype: torch.dtype) -> Work:
    """dy, ids, the table, weight, bias and cu_seqlens in; dtable, dweight and dbias out. FLOPs: those of x's gradient,
    and its sum by byte value."""
    taken = rows + 256 * channels * dtype.itemsize + _parameters(channels, taps, sequences)
    out = 256 * channels * dtype.itemsize + 4 * channels * (taps + 1)
    return Work((6 * taps + 2) * rows * channels, rows * channels * dtype.itemsize + taken + out)


def _parameters(channels: int, taps: int, sequences: int) -> int:
    """Bytes of weight, bias and cu_seqlens."""
    return 4 * channels * (taps + 1) + 4 * (sequences + 1)
