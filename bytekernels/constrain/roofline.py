"""Bytes of constrain_ends. The tree is left out: a walk reads little of it, and most of that is in caches."""

from bytekernels.roofline import Work


def constrain_ends(total: int, sequences: int) -> Work:
    """T bytes, T flags and cu_seqlens in; T flags out."""
    return Work(0, 3 * total + 4 * (sequences + 1))
