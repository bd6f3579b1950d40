"""Packing through the extension: csrc/pack.h."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.types import Number

from bytekernels import _C
from bytekernels.extension import array, fresh, threads
from bytekernels.pack.rows import check_rows, row_bytes
from bytekernels.ragged import cu_seqlens_of


def pack_documents(
    sequences: Sequence[bytes | bytearray | memoryview], bos: int | None, out: Tensor | None, pin: bool
) -> tuple[Tensor, Tensor]:
    first = -1 if bos is None else bos
    cu_seqlens = torch.empty(len(sequences) + 1, dtype=torch.int32, pin_memory=pin)
    total = _C.document_offsets(sequences, first, array(cu_seqlens))
    if out is not None:
        check_rows(out, total)
        ids = out
    elif pin:
        ids = torch.empty(total, dtype=torch.uint8, pin_memory=True)
    else:
        ids = fresh(cu_seqlens, (total,), torch.uint8)
    _C.pack_documents(sequences, first, array(cu_seqlens), array(ids), threads())
    return ids, cu_seqlens


def pack_rows(padded: Tensor, lengths: Tensor, bos: int | None, total: int) -> tuple[Tensor, Tensor]:
    padded = padded.contiguous()
    cu_seqlens = cu_seqlens_of(lengths if bos is None else lengths + 1)
    ids = fresh(padded, (total,))
    first = -1 if bos is None else bos
    _C.pack_rows(array(padded), padded.shape[1], first, array(cu_seqlens), array(ids), threads())
    return ids, cu_seqlens


def pack_flat(flat: Tensor, offsets: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    flat, offsets = flat.contiguous(), offsets.contiguous()
    cu_seqlens = offsets.clone() if bos is None else offsets + torch.arange(len(offsets), dtype=torch.int32)
    ids = fresh(flat, (int(cu_seqlens[-1]),))
    first = -1 if bos is None else bos
    _C.pack_flat(array(flat), array(offsets), first, array(cu_seqlens), array(ids), threads())
    return ids, cu_seqlens


def unpack(values: Tensor, cu_seqlens: Tensor, pad: Number, length: int, out: Tensor | None) -> Tensor:
    values, cu_seqlens = values.contiguous(), cu_seqlens.contiguous()
    padded = fresh(values, (len(cu_seqlens) - 1, length, *values.shape[1:])) if out is None else out
    _C.unpack(
        array(values),
        array(cu_seqlens),
        array(values.new_full((), pad)),
        row_bytes(values, 1),
        len(values),
        length,
        array(padded),
        threads(),
    )
    return padded


def pack_padded(padded: Tensor, cu_seqlens: Tensor, total: int, out: Tensor | None) -> Tensor:
    padded, cu_seqlens = padded.contiguous(), cu_seqlens.contiguous()
    values = fresh(padded, (total, *padded.shape[2:])) if out is None else out
    _C.pack_padded(
        array(padded),
        array(cu_seqlens),
        row_bytes(padded, 2),
        total,
        padded.shape[1],
        array(values),
        threads(),
    )
    return values


def next_byte_targets(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None) -> Tensor:
    ids, cu_seqlens = ids.contiguous(), cu_seqlens.contiguous()
    boundary = None if boundary is None else boundary.contiguous()
    targets = fresh(ids, dtype=torch.int64)
    ends = None if boundary is None else array(boundary)
    _C.next_byte_targets(array(ids), ends, array(cu_seqlens), array(targets), threads())
    return targets


def token_end_mask(
    token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor, bos: bool, total: int, check: bool
) -> Tensor:
    """Checks the lengths as it goes, whatever ``check`` says."""
    token_lengths, token_cu, cu_seqlens = (t.contiguous() for t in (token_lengths, token_cu, cu_seqlens))
    mask = fresh(cu_seqlens, (total,), torch.bool)
    _C.token_end_mask(array(token_lengths), array(token_cu), array(cu_seqlens), bos, array(mask), threads())
    return mask


def row_index(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    cu_seqlens = cu_seqlens.contiguous()
    sequence, position = fresh(cu_seqlens, (total,)), fresh(cu_seqlens, (total,))
    _C.row_index(array(cu_seqlens), array(sequence), array(position), threads())
    return sequence, position
