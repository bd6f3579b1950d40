"""FLOPs and bytes of sample: S rows of V logits."""

import torch

from bytekernels.roofline import Work


def sample(rows: int, vocabulary: int, dtype: torch.dtype) -> Work:
    """Logits, seed, counter and four settings of each row in, an int64 out.

    FLOPs: difference, quotient and sum of each value; what ranking compares is left out.
    """
    return Work(3 * rows * vocabulary, rows * (vocabulary * dtype.itemsize + 2 * 8 + 4 * 4 + 8))
