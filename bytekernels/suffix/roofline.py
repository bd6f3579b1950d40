"""Bytes of longest_suffix. The tree is left out: a walk reads little of it, and most of that is in caches."""

from bytekernels.roofline import Work


def longest_suffix(total: int, sequences: int, rows: int | None = None) -> Work:
    """T bytes and cu_seqlens in, and the R rows that are asked for; an int32 out for each of those, or of all."""
    return Work(0, total + 4 * (sequences + 1) + 4 * (total if rows is None else 2 * rows))


def longest_suffix_step(sequences: int) -> Work:
    """A byte of each sequence in, and into its ring; its count read and written; an int32 out."""
    return Work(0, sequences * (1 + 1 + 2 * 4 + 4))
