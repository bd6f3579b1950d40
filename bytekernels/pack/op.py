"""Packing as torch.library ops."""

from typing import Any

import torch
from torch import Tensor
from torch.types import Number

from bytekernels import dispatch, ragged
from bytekernels.extension import cuda, native


def implementations(op: str) -> dispatch.Dispatch:
    """Those of an op of this room."""
    return dispatch.Dispatch(op, native=native("pack"), cuda=cuda("pack"), reference=dispatch.reference("pack"))


_unpack = implementations("unpack")
_pack_padded = implementations("pack_padded")
_next_byte_targets = implementations("next_byte_targets")
_token_end_mask = implementations("token_end_mask")
_row_index = implementations("row_index")


def dynamic_size() -> Any:
    """A size that a fake can't know: it is read from data."""
    return torch.library.get_ctx().new_dynamic_size()


def _check_fits(cu_seqlens: Tensor, length: int, validate: bool | None) -> None:
    """Refuse sequences longer than a padded row."""
    if not ragged.validates(cu_seqlens, validate):
        return
    longer = (ragged.lengths_of(cu_seqlens) > length).nonzero()
    if len(longer):
        s = int(longer[0])
        raise ValueError(
            f"sequence {s} of cu_seqlens has {int(ragged.lengths_of(cu_seqlens)[s])} rows, "
            f"more than the {length} of a padded one"
        )


def _longest(cu_seqlens: Tensor) -> int:
    """Length of the longest sequence, 0 where there is none. Waits for the device."""
    return int(ragged.lengths_of(cu_seqlens).max()) if len(cu_seqlens) > 1 else 0


@torch.library.custom_op("bytekernels::unpack", mutates_args=())
def unpack_op(
    values: Tensor, cu_seqlens: Tensor, pad: Number, length: int | None = None, validate: bool | None = None
) -> Tensor:
    ragged.check_cu_seqlens(cu_seqlens, len(values), validate=validate)
    if length is None:
        length = _longest(cu_seqlens)
    else:
        _check_fits(cu_seqlens, length, validate)
    return _unpack(values, cu_seqlens, pad, length, None)


@unpack_op.register_fake
def _(
    values: Tensor, cu_seqlens: Tensor, pad: Number, length: int | None = None, validate: bool | None = None
) -> Tensor:
    length = dynamic_size() if length is None else length
    return values.new_empty((len(cu_seqlens) - 1, length, *values.shape[1:]))


@torch.library.custom_op("bytekernels::unpack_out", mutates_args=("out",))
def unpack_out_op(values: Tensor, cu_seqlens: Tensor, pad: Number, out: Tensor, validate: bool | None = None) -> None:
    ragged.check_cu_seqlens(cu_seqlens, len(values), validate=validate)
    _check_fits(cu_seqlens, out.shape[1], validate)
    _unpack(values, cu_seqlens, pad, out.shape[1], out)


@torch.library.custom_op("bytekernels::pack_padded", mutates_args=())
def pack_padded_op(
    padded: Tensor, cu_seqlens: Tensor, total: int | None = None, validate: bool | None = None
) -> Tensor:
    total = int(cu_seqlens[-1]) if total is None else total
    ragged.check_cu_seqlens(cu_seqlens, total, validate=validate)
    _check_fits(cu_seqlens, padded.shape[1], validate)
    return _pack_padded(padded, cu_seqlens, total, None)


@pack_padded_op.register_fake
def _(padded: Tensor, cu_seqlens: Tensor, total: int | None = None, validate: bool | None = None) -> Tensor:
    total = dynamic_size() if total is None else total
    return padded.new_empty((total, *padded.shape[2:]))


@torch.library.custom_op("bytekernels::pack_padded_out", mutates_args=("out",))
def pack_padded_out_op(padded: Tensor, cu_seqlens: Tensor, out: Tensor, validate: bool | None = None) -> None:
    ragged.check_cu_seqlens(cu_seqlens, len(out), validate=validate)
    _check_fits(cu_seqlens, padded.shape[1], validate)
    _pack_padded(padded, cu_seqlens, len(out), out)


@unpack_out_op.register_fake
@pack_padded_out_op.register_fake
def _(*args: Any) -> None:
    pass


@torch.library.custom_op("bytekernels::next_byte_targets", mutates_args=())
def next_byte_targets_op(
    ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None, validate: bool | None = None
) -> Tensor:
    ragged.check_cu_seqlens(cu_seqlens, len(ids), validate=validate)
    return _next_byte_targets(ids, cu_seqlens, boundary)


@next_byte_targets_op.register_fake
def _(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None, validate: bool | None = None) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.int64)


@torch.library.custom_op("bytekernels::token_end_mask", mutates_args=())
def token_end_mask_op(
    token_lengths: Tensor,
    token_cu: Tensor,
    cu_seqlens: Tensor,
    bos: bool,
    total: int | None = None,
    validate: bool | None = None,
) -> Tensor:
    total = int(cu_seqlens[-1]) if total is None else total
    ragged.check_cu_seqlens(token_cu, len(token_lengths), "token_cu", validate=validate)
    ragged.check_cu_seqlens(cu_seqlens, total, validate=validate)
    check = ragged.validates(token_lengths, validate)
    return _token_end_mask(token_lengths, token_cu, cu_seqlens, bos, total, check)


@token_end_mask_op.register_fake
def _(
    token_lengths: Tensor,
    token_cu: Tensor,
    cu_seqlens: Tensor,
    bos: bool,
    total: int | None = None,
    validate: bool | None = None,
) -> Tensor:
    return cu_seqlens.new_empty(dynamic_size() if total is None else total, dtype=torch.bool)


@torch.library.custom_op("bytekernels::row_index", mutates_args=())
def row_index_op(cu_seqlens: Tensor, total: int, validate: bool | None = None) -> tuple[Tensor, Tensor]:
    ragged.check_cu_seqlens(cu_seqlens, total, validate=validate)
    return _row_index(cu_seqlens, total)


@row_index_op.register_fake
def _(cu_seqlens: Tensor, total: int, validate: bool | None = None) -> tuple[Tensor, Tensor]:
    return cu_seqlens.new_empty(total), cu_seqlens.new_empty(total)


def _unpack_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, cu_seqlens = inputs[:2]
    ctx.save_for_backward(cu_seqlens)
    ctx.total = len(values)


def _unpack_backward(ctx: Any, dpadded: Tensor) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return pack_padded_op(dpadded, cu_seqlens, ctx.total), None, None, None, None


def _pack_padded_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    padded, cu_seqlens = inputs[:2]
    ctx.save_for_backward(cu_seqlens)
    ctx.length = padded.shape[1]


def _pack_padded_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    (cu_seqlens,) = ctx.saved_tensors
    return unpack_op(dvalues, cu_seqlens, 0, ctx.length), None, None, None


# Each is the other's transpose: what lies in the padding has no gradient.
unpack_op.register_autograd(_unpack_backward, setup_context=_unpack_context)
pack_padded_op.register_autograd(_pack_padded_backward, setup_context=_pack_padded_context)


def unpack(
    values: Tensor,
    cu_seqlens: Tensor,
    pad: Number,
    *,
    length: int | None = None,
    out: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Packed rows to padded ones. Differentiable in ``values``, unless there is an ``out``.

    Args:
        values: [T, ...], any dtype.
        cu_seqlens: int32 [S+1].
        pad: fills what lies beyond each sequence's end.
        length: rows of a padded sequence, at least the longest one's; None for just that, which is read from the
            device.
        out: [S, length, ...], contiguous, in values' dtype and on its device, which is written into and returned.
        validate: whether cu_seqlens on a CUDA device is checked, which waits for it; None as
            ``BYTEKERNELS_VALIDATE=1`` says. On the CPU it always is.

    Returns:
        [S, length, ...] in values' dtype.

    Raises:
        TypeError: cu_seqlens is not int32, or a fractional pad for integer values.
        ValueError: malformed cu_seqlens, a sequence longer than ``length``, or an ``out`` that does not fit.
    """
    if values.dim() == 0:
        raise ValueError("values must have shape [T, ...], got a scalar: use values.reshape(1)")
    if isinstance(pad, float) and not (values.is_floating_point() or values.is_complex()):
        raise TypeError(f"pad must be an integer for values of {values.dtype}, got {pad}")
    if out is None:
        return unpack_op(values, cu_seqlens, pad, length, validate)
    rows = out.shape[1] if length is None and out.dim() > 1 else length
    _check_out(out, values, (len(cu_seqlens) - 1, rows, *values.shape[1:]))
    unpack_out_op(values, cu_seqlens, pad, out, validate)
    return out


def pack_padded(
    padded: Tensor,
    cu_seqlens: Tensor,
    *,
    total: int | None = None,
    out: Tensor | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Padded rows to packed ones, the inverse of :func:`unpack`. Differentiable in ``padded``, unless there is ``out``.

    Args:
        padded: [S, L, ...], any dtype.
        cu_seqlens: int32 [S+1]; no sequence is longer than L.
        total: T; None to read it from cu_seqlens, which waits for a CUDA device.
        out: [T, ...], contiguous, in padded's dtype and on its device, which is written into and returned.
        validate: as in :func:`unpack`.

    Returns:
        [T, ...] in padded's dtype.

    Raises:
        TypeError: cu_seqlens is not int32.
        ValueError: malformed cu_seqlens, another number of sequences, one longer than L, or an ``out`` that does not
            fit.
    """
    if padded.dim() < 2 or len(padded) != len(cu_seqlens) - 1:
        raise ValueError(
            f"padded must have shape [{len(cu_seqlens) - 1}, L, ...], a row for each sequence of cu_seqlens, "
            f"got {list(padded.shape)}"
        )
    if out is None:
        return pack_padded_op(padded, cu_seqlens, total, validate)
    _check_out(out, padded, (len(out) if total is None and out.dim() else total, *padded.shape[2:]))
    pack_padded_out_op(padded, cu_seqlens, out, validate)
    return out


def _check_out(out: Tensor, like: Tensor, shape: tuple[int | None, ...]) -> None:
    """Refuse an output that is not of this shape, of like's dtype and device, contiguous, and without gradients."""
    if out.shape != shape or out.dtype != like.dtype or out.device != like.device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {like.dtype} {list(shape)} on {like.device}, got {out.dtype} {list(out.shape)} "
            f"with strides {out.stride()} on {out.device}"
        )
    if torch.is_grad_enabled() and (like.requires_grad or out.requires_grad):
        raise ValueError("out takes no gradients: leave it out, or call under torch.no_grad()")


def row_index(cu_seqlens: Tensor, total: int, *, validate: bool | None = None) -> tuple[Tensor, Tensor]:
    """Where each row lies: its sequence, and its position there.

    Args:
        cu_seqlens: int32 [S+1].
        total: T, the number of rows.
        validate: as in :func:`unpack`.

    Returns:
        ``sequence`` int32 [T], the number of the row's sequence; ``position`` int32 [T], from 0 in each sequence.

    Raises:
        TypeError: cu_seqlens is not int32.
        ValueError: malformed cu_seqlens, or a total that is not its last.
    """
    return row_index_op(cu_seqlens, total, validate)


def next_byte_targets(
    ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None = None, *, validate: bool | None = None
) -> Tensor:
    """The class that each byte is to predict: the next byte, and whether a chunk ends on it.

    ``target[t] = ids[t+1] + 256 * boundary[t+1]``, and -100 on each sequence's last byte.

    Args:
        ids: uint8 [T].
        cu_seqlens: int32 [S+1].
        boundary: bool [T], true where a chunk ends; None for plain bytes.
        validate: as in :func:`unpack`.

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
    return next_byte_targets_op(ids, cu_seqlens, boundary, validate)


def token_end_mask(
    token_lengths: Tensor,
    token_cu: Tensor,
    cu_seqlens: Tensor,
    bos: bool,
    *,
    total: int | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Marks the last byte of each token.

    Args:
        token_lengths: int32 [n], bytes of each token, all sequences' one after another; each at least 1.
        token_cu: int32 [S+1], offsets that cut the tokens into sequences.
        cu_seqlens: int32 [S+1], offsets that cut the bytes into sequences.
        bos: whether each (non-empty) sequence begins with a BOS byte, which is a token end of its own; the lengths
            then cover the rest.
        total: T; None to read it from cu_seqlens, which waits for a CUDA device.
        validate: as in :func:`unpack`; token_lengths are checked too.

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
    return token_end_mask_op(token_lengths, token_cu, cu_seqlens, bool(bos), total, validate)
