"""Bytes of the packing ops: T rows (bytes) in S sequences. Nothing is computed, so no FLOPs are counted."""

from bytekernels.roofline import Work


def pack_bytes(rows: int, sequences: int, *, bos: bool = True, offsets: bool = False) -> Work:
    """The documents in; ids and cu_seqlens out.

    Args:
        rows: T, of the result: with the BOS bytes, where ``bos``, which are read from nowhere.
        offsets: whether the documents come as a flat tensor with offsets, which are read too.
    """
    read = rows - sequences * bos + _offsets(sequences) * offsets
    return Work(0, read + rows + _offsets(sequences))


def unpack(rows: int, sequences: int, length: int, row_bytes: int) -> Work:
    """values and cu_seqlens in; out S padded sequences of ``length`` rows."""
    return Work(0, (rows + sequences * length) * row_bytes + _offsets(sequences))


def pack_padded(rows: int, sequences: int, row_bytes: int) -> Work:
    """cu_seqlens and the T rows that it names in, as many rows out."""
    return Work(0, 2 * rows * row_bytes + _offsets(sequences))


def next_byte_targets(rows: int, sequences: int, *, boundary: bool = True) -> Work:
    """ids, cu_seqlens and perhaps boundary in; targets (int64) out."""
    return Work(0, rows * (1 + boundary + 8) + _offsets(sequences))


def token_end_mask(rows: int, tokens: int, sequences: int) -> Work:
    """token_lengths, token_cu and cu_seqlens in; the mask out."""
    return Work(0, 4 * tokens + 2 * _offsets(sequences) + rows)


def row_index(rows: int, sequences: int) -> Work:
    """cu_seqlens in; sequence and position out."""
    return Work(0, _offsets(sequences) + 2 * 4 * rows)


def _offsets(sequences: int) -> int:
    """Bytes of a cu_seqlens."""
    return 4 * (sequences + 1)
