"""The norms as torch.library ops."""

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.norm import reference

_rms_norm = dispatch.Dispatch("rms_norm", reference=dispatch.reference("norm"))
_add_rms_norm = dispatch.Dispatch("add_rms_norm", reference=dispatch.reference("norm"))
_gated_rms_norm = dispatch.Dispatch("gated_rms_norm", reference=dispatch.reference("norm"))


@torch.library.custom_op("bytekernels::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("bytekernels::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return dispatch.vjp(reference.rms_norm, (x, weight, eps), (dy,))


@rms_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return dispatch.fake_gradients((x, weight))


@torch.library.custom_op("bytekernels::add_rms_norm", mutates_args=())
def add_rms_norm_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _add_rms_norm(x, residual, weight, eps)


@add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(residual)


@torch.library.custom_op("bytekernels::add_rms_norm_backward", mutates_args=())
def add_rms_norm_backward_op(
    dy: Tensor, dtotal: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> list[Tensor]:
    return dispatch.vjp(reference.add_rms_norm, (x, residual, weight, eps), (dy, dtotal))


@add_rms_norm_backward_op.register_fake
def _(
    dy: Tensor, dtotal: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> list[Tensor]:
    return dispatch.fake_gradients((x, residual, weight))


@torch.library.custom_op("bytekernels::gated_rms_norm", mutates_args=())
def gated_rms_norm_op(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    return _gated_rms_norm(y, z, weight, group_size, eps)


@gated_rms_norm_op.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    return torch.empty_like(y)


@torch.library.custom_op("bytekernels::gated_rms_norm_backward", mutates_args=())
def gated_rms_norm_backward_op(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
) -> list[Tensor]:
    return dispatch.vjp(reference.gated_rms_norm, (y, z, weight, group_size, eps), (dout,))


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


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, group_size: int | None = None, *, eps: float = 1e-5
) -> Tensor:
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
