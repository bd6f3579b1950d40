"""FLOPs and bytes of dechunk with all its options: T rows (bytes) of D values, M chunks, S sequences.

The residual is in the chunks' dtype, weight and confidence in float32.
"""

import torch

from bytekernels.roofline import Work


def dechunk(rows: int, width: int, chunks: int, sequences: int, dtype: torch.dtype) -> Work:
    """chunks, weight, null, residual, chunk_of and cu_chunks in; u out. The confidence is not read: its factor is 1.

    FLOPs: ``w c + (1 - w) z`` for each chunk, the residual's addition for each byte.
    """
    values = (chunks + 1 + 2 * rows) * width
    layout = 4 * chunks + 4 * rows + 4 * (sequences + 1)
    return Work(3 * chunks * width + rows * width, values * dtype.itemsize + layout)


def dechunk_backward(rows: int, width: int, chunks: int, sequences: int, dtype: torch.dtype) -> Work:
    """du, chunks, weight, null, chunk_of and cu_chunks in; dchunks, dweight, dnull and dconfidence out.

    The residual's gradient is du itself, and the confidence is not read. FLOPs for each byte: its share of a chunk's
    sum of du, and ``<du, u>``; for each chunk z again (3), ``dz + (1 - w) g`` (2), ``w g`` (1) and ``<g, c - z>`` (3).
    """
    values = (rows + 2 * chunks + 2) * width
    layout = 4 * chunks + 4 * rows + 4 * (sequences + 1)
    return Work(3 * rows * width + 9 * chunks * width, values * dtype.itemsize + layout + 4 * chunks + 4 * rows)
