"""Packing by the extension's CUDA kernels (csrc/cuda): one launch a call, on the current stream, without a wait."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.types import Number

from bytekernels import _C
from bytekernels.extension import array_on, where
from bytekernels.pack import reference
from bytekernels.pack.rows import row_bytes
from bytekernels.ragged import cu_seqlens_of, lengths_of


def pack_rows(padded: Tensor, lengths: Tensor, bos: int | None, total: int) -> tuple[Tensor, Tensor]:
    padded = padded.contiguous()
    cu_seqlens = cu_seqlens_of(lengths if bos is None else lengths + 1)
    ids = padded.new_empty(total)
    _pack(padded, cu_seqlens, 1, bos, ids)
    return ids, cu_seqlens


def pack_flat(flat: Tensor, offsets: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    flat, offsets = flat.contiguous(), offsets.contiguous()
    cu_seqlens = torch.empty_like(offsets)
    ids = flat.new_empty(len(flat) + (0 if bos is None else len(offsets) - 1))
    arrays = array_on(cu_seqlens), array_on(ids)
    _C.cuda.pack_flat(array_on(flat), array_on(offsets), -1 if bos is None else bos, *arrays, *where(flat))
    return ids, cu_seqlens


def unpack(values: Tensor, cu_seqlens: Tensor, pad: Number, length: int, out: Tensor | None) -> Tensor:
    values, cu_seqlens = values.contiguous(), cu_seqlens.contiguous()
    padded = values.new_empty((len(cu_seqlens) - 1, length, *values.shape[1:])) if out is None else out
    element = torch.full((1,), pad, dtype=values.dtype).view(torch.uint8).numpy().tobytes()
    _C.cuda.unpack(
        array_on(values),
        array_on(cu_seqlens),
        element,
        row_bytes(values, 1),
        len(values),
        length,
        array_on(padded),
        *where(values),
    )
    return padded


def pack_padded(padded: Tensor, cu_seqlens: Tensor, total: int, out: Tensor | None) -> Tensor:
    padded, cu_seqlens = padded.contiguous(), cu_seqlens.contiguous()
    values = padded.new_empty((total, *padded.shape[2:])) if out is None else out
    _pack(padded, cu_seqlens, row_bytes(padded, 2), None, values)
    return values


def _pack(padded: Tensor, cu_seqlens: Tensor, bytes_of_row: int, bos: int | None, out: Tensor) -> None:
    first, length = -1 if bos is None else bos, padded.shape[1]
    arrays = array_on(padded), array_on(cu_seqlens)
    _C.cuda.pack_padded(*arrays, bytes_of_row, length, first, array_on(out), *where(padded))


def next_byte_targets(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None) -> Tensor:
    ids, cu_seqlens = ids.contiguous(), cu_seqlens.contiguous()
    boundary = None if boundary is None else boundary.contiguous()
    targets = ids.new_empty(ids.shape, dtype=torch.int64)
    ends = None if boundary is None else array_on(boundary)
    _C.cuda.next_byte_targets(array_on(ids), ends, array_on(cu_seqlens), array_on(targets), *where(ids))
    return targets


def token_end_mask(
    token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor, bos: bool, total: int, check: bool
) -> Tensor:
    """PyTorch's running sum of the lengths, and one launch."""
    if check and bool(_some_token_is_wrong(token_lengths, token_cu, cu_seqlens, bos)):
        reference.token_end_mask(token_lengths, token_cu, cu_seqlens, bos, total, check)  # says what is wrong
    token_cu, cu_seqlens = token_cu.contiguous(), cu_seqlens.contiguous()
    sums = token_lengths.cumsum(0, dtype=torch.int32)
    mask = cu_seqlens.new_empty(total, dtype=torch.bool)
    arrays = array_on(sums), array_on(token_cu), array_on(cu_seqlens)
    _C.cuda.token_end_mask(*arrays, bos, array_on(mask), *where(mask))
    return mask


def row_index(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    cu_seqlens = cu_seqlens.contiguous()
    sequence, position = (cu_seqlens.new_empty(total) for _ in range(2))
    _C.cuda.row_index(array_on(cu_seqlens), array_on(sequence), array_on(position), *where(cu_seqlens))
    return sequence, position


def _some_token_is_wrong(token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor, bos: bool) -> Tensor:
    """Whether a token is shorter than 1, or a sequence's lengths do not sum to its bytes: bool scalar."""
    sums = F.pad(token_lengths.cumsum(0, dtype=torch.int64), (1, 0))  # [n+1]
    covered = lengths_of(cu_seqlens)
    covered = covered - ((covered > 0) & bos).to(torch.int32)
    return (token_lengths < 1).any() | (sums[token_cu.long()].diff() != covered).any()
