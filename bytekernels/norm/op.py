"""The norms as torch.library ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bytekernels import dispatch


def _why_not_native(*args: Any) -> str | None:
    """Why the extension can't serve these arguments of a norm or of its backward, or None."""
    *activations, _ = (value for value in args if isinstance(value, Tensor))  # the last is the weight
    dtypes = [value.dtype for value in activations]
    if any(dtype not in (torch.float32, torch.bfloat16) for dtype in dtypes):
        return f"inputs must be float32 or bfloat16, got {', '.join(map(str, dtypes))}"
    if 0 in activations[0].shape[-1:]:
        return "rows must not be empty"
    return dispatch.extension_refusal()


def _why_not_native_sum(*args: Any) -> str | None:
    """:func:`_why_not_native` for a norm of ``x + residual``: the residual is not narrower than x."""
    x, residual = args[-4:-2]
    if x.dtype == torch.float32 and residual.dtype != torch.float32:
        return f"a float32 x needs a float32 residual, got {residual.dtype}"
    return _why_not_native(*args)


def _why_not_native_gate(*args: Any) -> str | None:
    """:func:`_why_not_native` for a gated norm: y and z have one dtype."""
    y, z = args[-5:-3]
    if y.dtype != z.dtype:
        return f"y and z must have one dtype, got {y.dtype} and {z.dtype}"
    return _why_not_native(*args)


def _dispatch(op: str, why_not: Callable[..., str | None]) -> dispatch.Dispatch:
    native = dispatch.Implementation("bytekernels.norm.native", devices=("cpu",), why_not=why_not)
    return dispatch.Dispatch(op, triton=dispatch.triton("norm"), native=native, reference=dispatch.reference("norm"))


_rms_norm = _dispatch("rms_norm", _why_not_native)
_rms_norm_backward = _dispatch("rms_norm_backward", _why_not_native)
_add_rms_norm = _dispatch("add_rms_norm", _why_not_native_sum)
_add_rms_norm_backward = _dispatch("add_rms_norm_backward", _why_not_native_sum)
_gated_rms_norm = _dispatch("gated_rms_norm", _why_not_native_gate)
_gated_rms_norm_backward = _dispatch("gated_rms_norm_backward", _why_not_native_gate)


@torch.library.custom_op("bytekernels::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps).contiguous()


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("bytekernels::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return _rms_norm_backward(dy, x, weight, eps)


@rms_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return dispatch.fake_gradients((x, weight))


@torch.library.custom_op("bytekernels::add_rms_norm", mutates_args=())
def add_rms_norm_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total = _add_rms_norm(x, residual, weight, eps)
    return y.contiguous(), total.contiguous()


@add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


@torch.library.custom_op("bytekernels::add_rms_norm_backward", mutates_args=())
def add_rms_norm_backward_op(
    dy: Tensor, dtotal: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> list[Tensor]:
    return _add_rms_norm_backward(dy, dtotal, x, residual, weight, eps)


@add_rms_norm_backward_op.register_fake
def _(dy: Tensor, dtotal: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return dispatch.fake_gradients((x, residual, weight))


@torch.library.custom_op("bytekernels::gated_rms_norm", mutates_args=())
def gated_rms_norm_op(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    return _gated_rms_norm(y, z, weight, group_size, eps).contiguous()


@gated_rms_norm_op.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("bytekernels::gated_rms_norm_backward", mutates_args=())
def gated_rms_norm_backward_op(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
) -> list[Tensor]:
    return _gated_rms_norm_backward(dout, y, z, weight, group_size, eps)


@gated_rms_norm_backward_op.register_fake
def _(dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> list[Tensor]:
    return dispatch.fake_gradients((y, z, weight))


dispatch.register_gradients(rms_norm_op, rms_norm_backward_op)
dispatch.register_gradients(add_rms_norm_op, add_rms_norm_backward_op)
dispatch.register_gradients(gated_rms_norm_op, gated_rms_norm_backward_op)


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """RMS norm of ``x + residual``, and that sum.

    ``y = (x + residual) / sqrt(mean((x + residual)^2) + eps) * weight`` (arXiv 1910.07467, equation 4).

    Args:
        x: [..., D], a floating dtype.
        weight: [D].
        residual: [..., D] or None for zero; the sum is carried in its dtype.
        eps: added to the mean square.

    Returns:
        ``y`` [..., D] in x's dtype and the new residual [..., D] in the residual's (``x`` itself without one).

    Raises:
        ValueError: shapes that do not match.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape [{x.shape[-1]}], the last of x's, got {list(weight.shape)}")
    if residual is None:
        return rms_norm_op(x, weight, eps), x
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {list(x.shape)}, got {list(residual.shape)}")
    return add_rms_norm_op(x, residual, weight, eps)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int | None = None, *, eps: float = 1e-5) -> Tensor:
    """RMS norm of ``y * silu(z)`` in groups: Mamba2's norm after the gate (Dao & Gu 2024, section 7.1).

    Args:
        y: [..., D], a floating dtype.
        z: [..., D], the gate.
        weight: [D].
        group_size: rows of D are normalised in groups of this size; None for the whole of D.
        eps: added to the mean square.

    Returns:
        [..., D] in y's dtype.

    Raises:
        ValueError: shapes that do not match, or a group size that does not divide D.
    """
    width = y.shape[-1]
    group_size = width if group_size is None else group_size
    if z.shape != y.shape:
        raise ValueError(f"z must have y's shape {list(y.shape)}, got {list(z.shape)}")
    if weight.shape != (width,):
        raise ValueError(f"weight must have shape [{width}], the last of y's, got {list(weight.shape)}")
    if group_size <= 0 or width % group_size:
        raise ValueError(f"group_size must divide {width}, the width of y, got {group_size}")
    return gated_rms_norm_op(y, z, weight, group_size, eps)
