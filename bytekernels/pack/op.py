"""Packing as torch.library ops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.types import Number

from bytekernels import dispatch, ragged
from bytekernels.extension import native


def _implementations(op: str) -> dispatch.Dispatch:
    return dispatch.Dispatch(op, native=native("pack"), reference=dispatch.reference("pack"))


_pack_documents = _implementations("pack_documents")
_pack_rows = _implementations("pack_rows")
_unpack = _implementations("unpack")
_pack_padded = _implementations("pack_padded")
_next_byte_targets = _implementations("next_byte_targets")
_token_end_mask = _implementations("token_end_mask")


def _dynamic_size() -> Any:
    """A size that a fake can't know: it is read from data."""
    return torch.library.get_ctx().new_dynamic_size()


def _check_fits(cu_seqlens: Tensor, length: int) -> None:
    """Refuse sequences longer than a padded row (on the CPU, where reading is free)."""
    if cu_seqlens.device.type != "cpu":
        return
    longer = (ragged.lengths_of(cu_seqlens) > length).nonzero()
    if len(longer):
        s = int(longer[0])
        raise ValueError(
            f"sequence {s} of cu_seqlens has {int(ragged.lengths_of(cu_seqlens)[s])} rows, "
            f"more than the {length} of a padded one"
        )


@torch.library.custom_op("bytekernels::pack_rows", mutates_args=())
def pack_rows_op(padded: Tensor, lengths: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    wrong = ((lengths < 0) | (lengths > padded.shape[1])).nonzero()
    if len(wrong):
        s = int(wrong[0])
        raise ValueError(f"lengths must lie in [0, {padded.shape[1]}], padded's width, got {int(lengths[s])} at {s}")
    total = int(lengths.sum()) + (0 if bos is None else len(lengths))
    if total >= 2**31:
        raise ValueError(f"the batch has {total} bytes, int32 cu_seqlens count up to 2^31 - 1: pack it in several")
    return _pack_rows(padded, lengths, bos)


@pack_rows_op.register_fake
def _(padded: Tensor, lengths: Tensor, bos: int | None) -> tuple[Tensor, Tensor]:
    return padded.new_empty(_dynamic_size()), lengths.new_empty(len(lengths) + 1, dtype=torch.int32)


@torch.library.custom_op("bytekernels::unpack", mutates_args=())
def unpack_op(values: Tensor, cu_seqlens: Tensor, pad: Number, length: int | None) -> Tensor:
    ragged.check_cu_seqlens(cu_seqlens, len(values))
    if length is not None:
        _check_fits(cu_seqlens, length)
    return _unpack(values, cu_seqlens, pad, length)


@unpack_op.register_fake
def _(values: Tensor, cu_seqlens: Tensor, pad: Number, length: int | None) -> Tensor:
    length = _dynamic_size() if length is None else length
    return values.new_empty((len(cu_seqlens) - 1, length, *values.shape[1:]))


@torch.library.custom_op("bytekernels::pack_padded", mutates_args=())
def pack_padded_op(padded: Tensor, cu_seqlens: Tensor, total: int | None) -> Tensor:
    ragged.check_cu_seqlens(cu_seqlens, int(cu_seqlens[-1]) if total is None else total)
    _check_fits(cu_seqlens, padded.shape[1])
    return _pack_padded(padded, cu_seqlens, total)


@pack_padded_op.register_fake
def _(padded: Tensor, cu_seqlens: Tensor, total: int | None) -> Tensor:
    total = _dynamic_size() if total is None else total
    return padded.new_empty((total, *padded.shape[2:]))


@torch.library.custom_op("bytekernels::next_byte_targets", mutates_args=())
def next_byte_targets_op(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None) -> Tensor:
    ragged.check_cu_seqlens(cu_seqlens, len(ids))
    return _next_byte_targets(ids, cu_seqlens, boundary)


@next_byte_targets_op.register_fake
def _(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.int64)


@torch.library.custom_op("bytekernels::token_end_mask", mutates_args=())
def token_end_mask_op(token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor, bos: bool) -> Tensor:
    ragged.check_cu_seqlens(token_cu, len(token_lengths), "token_cu")
    ragged.check_cu_seqlens(cu_seqlens, int(cu_seqlens[-1]))
    return _token_end_mask(token_lengths, token_cu, cu_seqlens, bos)


@token_end_mask_op.register_fake
def _(token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor, bos: bool) -> Tensor:
    return cu_seqlens.new_empty(_dynamic_size(), dtype=torch.bool)


def _unpack_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, cu_seqlens, _, _ = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.total = len(values)


def _unpack_backward(ctx: Any, dpadded: Tensor) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return pack_padded_op(dpadded, cu_seqlens, ctx.total), None, None, None


def _pack_padded_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    padded, cu_seqlens, _ = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.length = padded.shape[1]


def _pack_padded_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return unpack_op(dvalues, cu_seqlens, 0, ctx.length), None, None


# Each is the other's transpose: what lies in the padding has no gradient.
unpack_op.register_autograd(_unpack_backward, setup_context=_unpack_context)
pack_padded_op.register_autograd(_pack_padded_backward, setup_context=_pack_padded_context)


def pack_bytes(
    sequences: Sequence[bytes | bytearray | memoryview] | tuple[Tensor, Tensor],
    *,
    bos: int | None = ragged.BOS,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Documents, one after another on a flat axis of bytes. Any byte value may occur in them.

    Args:
        sequences: S documents of bytes; or the pair (padded uint8 [S, L], lengths integer [S]).
        bos: the byte put before each document, None for none. An empty document becomes this byte alone.
        device: where the result goes.

    Returns:
        ``ids`` uint8 [T] and ``cu_seqlens`` int32 [S+1].

    Raises:
        TypeError: a document that is not bytes (a str is to be encoded first), or tensors of other dtypes.
        ValueError: bos outside [0, 255], shapes that do not match, lengths outside [0, L], or 2^31 bytes and more.
    """
    if bos is not None and not 0 <= bos <= 255:
        raise ValueError(f"bos must be a byte in [0, 255], or None for none, got {bos}")
    if isinstance(sequences, tuple) and len(sequences) == 2 and isinstance(sequences[0], Tensor):
        padded, lengths = sequences
        if padded.dtype != torch.uint8 or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
            raise TypeError(f"padded must be uint8 and lengths of integers, got {padded.dtype} and {lengths.dtype}")
        if padded.dim() != 2 or lengths.shape != padded.shape[:1]:
            raise ValueError(
                f"padded must have shape [S, L] and lengths [S], got {list(padded.shape)} and {list(lengths.shape)}"
            )
        ids, cu_seqlens = pack_rows_op(padded, lengths.to(device=padded.device, dtype=torch.int64), bos)
    else:
        if isinstance(sequences, bytes | bytearray | memoryview | str):
            raise TypeError(f"sequences must be a list of documents, got one {type(sequences).__name__}: put it in []")
        ids, cu_seqlens = _run_on_host(_pack_documents, list(sequences), bos)
    return ids.to(device), cu_seqlens.to(device)


def _run_on_host(op: dispatch.Dispatch, *args: Any) -> Any:
    """Call an op that takes no tensor to choose a device by."""
    return op.implementations[op.choose("cpu", args)].function(op.op)(*args)


def unpack(values: Tensor, cu_seqlens: Tensor, pad: Number) -> Tensor:
    """Packed rows to padded ones. Differentiable in ``values``.

    Args:
        values: [T, ...], any dtype.
        cu_seqlens: int32 [S+1].
        pad: fills what lies beyond each sequence's end.

    Returns:
        [S, max_len, ...] in values' dtype, where max_len is the longest sequence's length.

    Raises:
        TypeError: cu_seqlens is not int32, or a fractional pad for integer values.
        ValueError: malformed cu_seqlens.
    """
    if values.dim() == 0:
        raise ValueError("values must have shape [T, ...], got a scalar: use values.reshape(1)")
    if isinstance(pad, float) and not (values.is_floating_point() or values.is_complex()):
        raise TypeError(f"pad must be an integer for values of {values.dtype}, got {pad}")
    return unpack_op(values, cu_seqlens, pad, None)


def pack_padded(padded: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Padded rows to packed ones, the inverse of :func:`unpack`. Differentiable in ``padded``.

    Args:
        padded: [S, L, ...], any dtype.
        cu_seqlens: int32 [S+1]; no sequence is longer than L.

    Returns:
        [T, ...] in padded's dtype.

    Raises:
        TypeError: cu_seqlens is not int32.
        ValueError: malformed cu_seqlens, another number of sequences, or one longer than L.
    """
    if padded.dim() < 2 or len(padded) != len(cu_seqlens) - 1:
        raise ValueError(
            f"padded must have shape [{len(cu_seqlens) - 1}, L, ...], a row for each sequence of cu_seqlens, "
            f"got {list(padded.shape)}"
        )
    return pack_padded_op(padded, cu_seqlens, None)


def next_byte_targets(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None = None) -> Tensor:
    """The class that each byte is to predict: the next byte, and whether a chunk ends on it.

    ``target[t] = ids[t+1] + 256 * boundary[t+1]``, and -100 on each sequence's last byte.

    Args:
        ids: uint8 [T].
        cu_seqlens: int32 [S+1].
        boundary: bool [T], true where a chunk ends; None for plain bytes.

    Returns:
        int64 [T].

    Raises:
        TypeError: ids is not uint8, boundary not bool or cu_seqlens not int32.
        ValueError: malformed cu_seqlens, or shapes that do not match.
    """
    if ids.dtype != torch.uint8:
        raise TypeError(f"ids must be uint8, got {ids.dtype}: use ids.to(torch.uint8)")
    if ids.dim() != 1:
        raise ValueError(f"ids must have shape [T], got {list(ids.shape)}")
    if boundary is not None:
        if boundary.dtype != torch.bool:
            raise TypeError(f"boundary must be bool, got {boundary.dtype}: use boundary.to(torch.bool)")
        if boundary.shape != ids.shape:
            raise ValueError(f"boundary must have ids' shape {list(ids.shape)}, got {list(boundary.shape)}")
    return next_byte_targets_op(ids, cu_seqlens, boundary)


def token_end_mask(token_lengths: Tensor, token_cu: Tensor, cu_seqlens: Tensor, bos: bool) -> Tensor:
    """Marks the last byte of each token.

    Args:
        token_lengths: int32 [n], bytes of each token, all sequences' one after another; each at least 1.
        token_cu: int32 [S+1], offsets that cut the tokens into sequences.
        cu_seqlens: int32 [S+1], offsets that cut the bytes into sequences.
        bos: whether each (non-empty) sequence begins with a BOS byte, which is a token end of its own; the lengths
            then cover the rest.

    Returns:
        bool [T].

    Raises:
        TypeError: a tensor that is not int32.
        ValueError: malformed offsets, different numbers of sequences, a token of no or negative length, or lengths
            that do not sum to their sequence's bytes.
    """
    if token_lengths.dtype != torch.int32:
        raise TypeError(f"token_lengths must be int32, got {token_lengths.dtype}: use token_lengths.to(torch.int32)")
    if token_lengths.dim() != 1:
        raise ValueError(f"token_lengths must have shape [n], got {list(token_lengths.shape)}")
    if token_cu.shape != cu_seqlens.shape:
        raise ValueError(f"token_cu must have cu_seqlens' shape {list(cu_seqlens.shape)}, got {list(token_cu.shape)}")
    return token_end_mask_op(token_lengths, token_cu, cu_seqlens, bool(bos))
