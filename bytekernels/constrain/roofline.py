"""Bytes of constrain_ends. The tree is left out: a walk reads little of it, and most of that is in caches."""

from bytekernels.roofline import Work


def constrain_ends(total: int, sequences: int) -> Work:
    """T bytes, T log-odds, cu_seqlens and the given rows in; T flags out."""
    return Work(0, 6 * total + 4 * (2 * sequences + 1))
