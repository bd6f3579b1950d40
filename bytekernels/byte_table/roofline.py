"""FLOPs and bytes of byte_table: T rows (bytes) of C values."""

import torch

from bytekernels.roofline import Work


def byte_table(rows: int, width: int, dtype: torch.dtype) -> Work:
    """ids and the table in, a row for each byte out. No arithmetic."""
    return Work(0, rows + (256 + rows) * width * dtype.itemsize)


def byte_table_backward(rows: int, width: int, dtype: torch.dtype) -> Work:
    """ids and a row for each byte in, the table's gradient out. FLOPs: an addition for each value."""
    return Work(rows * width, rows + (256 + rows) * width * dtype.itemsize)
