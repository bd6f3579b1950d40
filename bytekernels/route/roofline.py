"""FLOPs and bytes of route and gather_chunks: T rows (bytes) of D values, M chunks, S sequences."""

import torch

from bytekernels.roofline import Work


def route(rows: int, width: int, chunks: int, sequences: int, dtype: torch.dtype) -> Work:
    """q, k and cu_seqlens in; prob (float32), boundary, chunk_of, index and cu_chunks out.

    FLOPs: the products q·k, q·q and k·k.
    """
    layout = rows * (4 + 1 + 4) + 4 * chunks + 4 * (sequences + 1)
    return Work(6 * rows * width, 2 * rows * width * dtype.itemsize + 4 * (sequences + 1) + layout)


def route_backward(rows: int, width: int, chunks: int, sequences: int, dtype: torch.dtype) -> Work:
    """dprob, q, k and cu_seqlens in; dq and dk out.

    FLOPs: the three products again, and each gradient as a weighted sum of a row of q and a row of k.
    """
    return Work(12 * rows * width, 4 * rows * width * dtype.itemsize + 4 * rows + 4 * (sequences + 1))


def gather_chunks(rows: int, width: int, chunks: int, sequences: int, dtype: torch.dtype) -> Work:
    """index and the M rows that it names in, as many rows out."""
    return Work(0, 2 * chunks * width * dtype.itemsize + 4 * chunks)


def gather_chunks_backward(rows: int, width: int, chunks: int, sequences: int, dtype: torch.dtype) -> Work:
    """de and index in; dh out, all T rows of it."""
    return Work(0, (chunks + rows) * width * dtype.itemsize + 4 * chunks)
