"""Packing through the extension: csrc/pack.h."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.types import Number

from bytekernels import _C
from bytekernels.extension import array, fresh, threads
from bytekernels.ragged import cu_seqlens_of, lengths_of


def pack_documents(sequences: Sequence[bytes | bytearray | memoryview], bos: int | None) -> tuple[Tensor, Tensor]:
    first = -1 if bos is None else bos
    cu_seqlens = torch.empty(len(sequences) + 1, dtype=torch.int32)
    total = _C.document_offsets(sequences, first, array(cu_seqlens))
    ids = torch.empty(total, dtype=torch.uint8)
    _C.pack_documents(sequences, first, array(cu_seqlens), array(ids), threads())
    return ids, cu_seqlens


def pack_rows(padded: Tensor, lengths: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    padded = padded.contiguous()
    cu_seqlens = cu_seqlens_of(lengths if bos is None else lengths + 1)
    ids = torch.empty(int(cu_seqlens[-1]), dtype=torch.uint8)
    first = -1 if bos is None else bos
    _C.pack_rows(array(padded), padded.shape[1], first, array(cu_seqlens), array(ids), threads())
    return ids, cu_seqlens


def unpack(values: Tensor, cu_seqlens: Tensor, pad: Number, length: int | None) -> Tensor:
    values, cu_seqlens = values.contiguous(), cu_seqlens.contiguous()
    sequences = len(cu_seqlens) - 1
    if length is None:
        length = int(lengths_of(cu_seqlens).max()) if sequences else 0
    padded = fresh(values, (sequences, length, *values.shape[1:]))
    element = values.new_full((), pad)
    _C.unpack(
        array(values),
        array(cu_seqlens),
        array(element),
        _row_bytes(values, 1),
        len(values),
        length,
        array(padded),
        threads(),
    )
    return padded


def pack_padded(padded: Tensor, cu_seqlens: Tensor, total: int | None) -> Tensor:
    padded, cu_seqlens = padded.contiguous(), cu_seqlens.contiguous()
    if total is None:
        total = int(cu_seqlens[-1])
    values = fresh(padded, (total, *padded.shape[2:]))
    _C.pack_padded(
        array(padded),
        array(cu_seqlens),
        _row_bytes(padded, 2),
        total,
        padded.shape[1],
        array(values),
        threads(),
    )
    return values


def next_byte_targets(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None) -> Tensor:
    ids, cu_seqlens = ids.contiguous(), cu_seqlens.contiguous()
    boundary = None if boundary is None else boundary.contiguous()
    targets = torch.empty(len(ids), dtype=torch.int64)
    ends = None if boundary is None else array(boundary)
    _C.next_byte_targets(array(ids), ends, array(cu_seqlens), array(targets), threads())
    return targets


def token_end_mask(token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor, bos: bool) -> Tensor:
    token_lengths, token_cu, cu_seqlens = (t.contiguous() for t in (token_lengths, token_cu, cu_seqlens))
    mask = torch.empty(int(cu_seqlens[-1]), dtype=torch.bool)
    _C.token_end_mask(array(token_lengths), array(token_cu), array(cu_seqlens), bos, array(mask), threads())
    return mask


def _row_bytes(tensor: Tensor, leading: int) -> int:
    """Bytes of one row: what the dimensions after the ``leading`` ones hold."""
    return int(torch.Size(tensor.shape[leading:]).numel()) * tensor.element_size()
