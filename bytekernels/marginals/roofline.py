"""FLOPs and bytes of byte_marginals and token_prefix: T rows (bytes), M chunks, V entries of the vocabulary.

The vocabulary's arrays are left out: they are the same for every call, and small beside the logits of many chunks.
"""

import torch

from bytekernels.roofline import Work


def byte_marginals(rows: int, chunks: int, vocabulary: int, dtype: torch.dtype) -> Work:
    """Logits, chunk_of and prefix in; 512 float32 of each row out.

    FLOPs: the difference of each logit to the greatest, and one sum over the vocabulary.
    """
    return Work(2 * chunks * vocabulary, chunks * vocabulary * dtype.itemsize + rows * (2 * 4 + 512 * 4))


def token_prefix(rows: int, sequences: int) -> Work:
    """Bytes, boundary and cu_seqlens in; prefix out."""
    return Work(0, rows * (1 + 1 + 4) + 4 * (sequences + 1))
