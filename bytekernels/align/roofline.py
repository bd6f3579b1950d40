"""Bytes of align_pack: S sequences of T rows (bytes, with BOS and EOS) and M tokens (with theirs)."""

from bytekernels.roofline import Work


def align_pack(
    rows: int, tokens: int, sequences: int, *, ended: int = 0, targets: bool = True, length_bytes: int = 2
) -> Work:
    """text, token_ids, token_lengths, spans and ends in, of which the spans' parts count; the batch out.

    Args:
        ended: how many sequences end with EOS.
        targets: whether targets are made.
        length_bytes: of an element of token_lengths.
    """
    added = sequences + ended  # bytes, and tokens, that come from no corpus
    read = (rows - added) + (tokens - added) * (4 + length_bytes) + sequences * (4 * 8 + 1)
    written = rows * (1 + 1 + 8 * targets) + 8 * tokens + 2 * 4 * (sequences + 1)
    return Work(0, read + written)
