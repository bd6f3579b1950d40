"""FLOPs and bytes of the norms: rows of D values, a float32 weight. A sigmoid counts as three operations."""

import torch

from bytekernels.roofline import Work


def rms_norm(rows: int, width: int, dtype: torch.dtype) -> Work:
    """x and weight in, y out. FLOPs: the mean square (2), ``h r weight`` (2)."""
    return _work(rows, width, 4, 2 * dtype.itemsize, 1)


def rms_norm_backward(rows: int, width: int, dtype: torch.dtype) -> Work:
    """dy, x and weight in, dx and dweight out.

    FLOPs: the mean square (2), ``g`` (1), ``mean(g h)`` (2), ``r (g - h along)`` (3), the sum of ``dy h r`` (3).
    """
    return _work(rows, width, 11, 3 * dtype.itemsize, 2)


def add_rms_norm(rows: int, width: int, dtype: torch.dtype, residual: torch.dtype = torch.float32) -> Work:
    """As :func:`rms_norm`, with the residual in and the sum out in the residual's dtype; 1 operation more."""
    return _work(rows, width, 5, 2 * dtype.itemsize + 2 * residual.itemsize, 1)


def add_rms_norm_backward(rows: int, width: int, dtype: torch.dtype, residual: torch.dtype = torch.float32) -> Work:
    """As :func:`rms_norm_backward`, with dtotal and the residual in and dresidual out; 2 operations more."""
    return _work(rows, width, 13, 3 * dtype.itemsize + 3 * residual.itemsize, 2)


def gated_rms_norm(rows: int, width: int, dtype: torch.dtype) -> Work:
    """y, z and weight in, out out. FLOPs: ``y silu(z)`` (5), the mean square (2), ``h r weight`` (2)."""
    return _work(rows, width, 9, 3 * dtype.itemsize, 1)


def gated_rms_norm_backward(rows: int, width: int, dtype: torch.dtype) -> Work:
    """dout, y, z and weight in, dy, dz and dweight out.

    FLOPs: ``y silu(z)`` (5), ``dh/dz`` (4), those of :func:`rms_norm_backward` (11), dy and dz (2).
    """
    return _work(rows, width, 22, 5 * dtype.itemsize, 2)


def _work(rows: int, width: int, flops: int, element_bytes: int, vectors: int) -> Work:
    """Operations and bytes for each element, and float32 vectors [D] that are read or written."""
    return Work(flops * rows * width, element_bytes * rows * width + 4 * vectors * width)
