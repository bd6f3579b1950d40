"""Packing in plain PyTorch: the specification.

Row t of sequence s lies at ``cu_seqlens[s] + t`` on the packed axis and at ``[s, t]`` of the padded tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.types import Number

from bytekernels.pack.rows import check_rows
from bytekernels.ragged import IGNORE, cu_seqlens_of, lengths_of, positions, segment_ids


def pack_documents(
    sequences: Sequence[bytes | bytearray | memoryview], bos: int | None, out: Tensor | None = None, pin: bool = False
) -> tuple[Tensor, Tensor]:
    for s, document in enumerate(sequences):
        is_bytes = isinstance(document, bytes | bytearray | memoryview)
        if not is_bytes or not memoryview(document).c_contiguous or memoryview(document).itemsize != 1:
            raise TypeError(
                f"sequences[{s}] must be bytes, bytearray or a contiguous memoryview of bytes, "
                f"got {type(document).__name__}{': use .encode()' if isinstance(document, str) else ''}"
            )
    first = b"" if bos is None else bytes([bos])
    flat = bytearray(b"".join(first + bytes(document) for document in sequences))
    lengths = torch.tensor([len(first) + memoryview(document).nbytes for document in sequences], dtype=torch.int64)
    ids = torch.frombuffer(flat, dtype=torch.uint8) if flat else torch.empty(0, dtype=torch.uint8)
    if out is not None:
        check_rows(out, len(ids))
        ids = out.copy_(ids)
    cu_seqlens = cu_seqlens_of(lengths)
    return (ids.pin_memory(), cu_seqlens.pin_memory()) if pin else (ids, cu_seqlens)


def pack_rows(padded: Tensor, lengths: Tensor, bos: int | None, total: int) -> tuple[Tensor, Tensor]:
    if bos is not None:
        first = padded.new_full((len(padded), 1), bos)
        padded, lengths = torch.cat([first, padded], dim=1), lengths + 1
    cu_seqlens = cu_seqlens_of(lengths)
    return pack_padded(padded, cu_seqlens, total), cu_seqlens


def pack_flat(flat: Tensor, offsets: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    added = 0 if bos is None else 1
    sequences = len(offsets) - 1
    cu_seqlens = offsets + added * torch.arange(sequences + 1, dtype=torch.int32, device=offsets.device)
    ids = flat.new_full((len(flat) + added * sequences,), bos or 0)
    rows = torch.arange(len(flat), device=flat.device)
    ids[rows + added * (segment_ids(offsets, len(flat)) + 1)] = flat
    return ids, cu_seqlens


def unpack(values: Tensor, cu_seqlens: Tensor, pad: Number, length: int, out: Tensor | None = None) -> Tensor:
    total, sequences = len(values), len(cu_seqlens) - 1
    padded = values.new_empty((sequences, length, *values.shape[1:])) if out is None else out
    padded.fill_(pad)
    padded[segment_ids(cu_seqlens, total), positions(cu_seqlens, total)] = values
    return padded


def pack_padded(padded: Tensor, cu_seqlens: Tensor, total: int, out: Tensor | None = None) -> Tensor:
    values = padded[segment_ids(cu_seqlens, total), positions(cu_seqlens, total)]
    return values if out is None else out.copy_(values)


def next_byte_targets(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None) -> Tensor:
    targets = ids.roll(-1).to(torch.int64)
    if boundary is not None:
        targets += 256 * boundary.roll(-1).to(torch.int64)
    ends = cu_seqlens[1:].to(torch.int64)
    targets[ends[lengths_of(cu_seqlens) > 0] - 1] = IGNORE
    return targets


def token_end_mask(
    token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor, bos: bool, total: int, check: bool = True
) -> Tensor:
    """Checks the lengths, whatever ``check`` says."""
    tokens = len(token_lengths)
    sequence = segment_ids(token_cu, tokens)  # [n]
    has_bos = (lengths_of(cu_seqlens) > 0) & bos  # [S]
    covered = lengths_of(cu_seqlens) - has_bos.to(torch.int32)  # [S]

    wrong = ((token_lengths < 1).nonzero()).flatten()
    sums = torch.zeros_like(covered, dtype=torch.int64).index_add_(0, sequence, token_lengths.to(torch.int64))
    off = (sums != covered).nonzero().flatten()
    if len(wrong) and (not len(off) or int(sequence[wrong[0]]) <= int(off[0])):
        token = int(wrong[0])
        raise ValueError(
            f"token_lengths[{token}] is {int(token_lengths[token])} (sequence {int(sequence[token])}): every token "
            f"covers at least one byte, so leave out those that cover none"
        )
    if len(off):
        s = int(off[0])
        raise ValueError(
            f"token_lengths of sequence {s} sum to {int(sums[s])}, but it has {int(covered[s])} bytes"
            f"{' after BOS' if bos else ''}"
        )

    # Each sequence's tokens cover it, so the tokens of the batch and its BOS bytes, in order, cover the flat axis.
    bos_before = has_bos.to(torch.int64).cumsum(0)[sequence]  # [n]
    mask = torch.zeros(total, dtype=torch.bool, device=cu_seqlens.device)
    mask[token_lengths.to(torch.int64).cumsum(0) + bos_before - 1] = True
    mask[cu_seqlens[:-1][has_bos].to(torch.int64)] = True
    return mask


def row_index(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    return segment_ids(cu_seqlens, total).to(torch.int32), positions(cu_seqlens, total).to(torch.int32)
