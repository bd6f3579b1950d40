"""The scan and its single step as torch.library ops."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.ragged import accumulation_dtype, check_cu_seqlens


def _why_not_native(*args: Any) -> str | None:
    """Why the extension can't serve these arguments of ssd_scan, or of its backward, or None."""
    x, _, _, B, C, _, _, z = args[-13:-5]
    dtypes = {value.dtype for value in (x, B, C, z) if value is not None}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        return f"x, B, C and z must all be float32 or all bfloat16, got {', '.join(sorted(map(str, dtypes)))}"
    if 0 in (*x.shape[1:], B.shape[2]):
        return "H, P and N must not be zero"
    return dispatch.extension_refusal()


def _why_not_triton(*args: Any) -> str | None:
    """Why the kernels can't serve these arguments of ssd_scan, or of its backward, or None."""
    from bytekernels.ssd.triton import refusal_of_sizes  # here, where Triton is known to be installed

    x, _, _, B, C, _, _, z = args[-13:-5]
    dtypes = {value.dtype for value in (x, B, C, z) if value is not None}
    if len(dtypes) > 1:
        return f"x, B, C and z must have one dtype, got {', '.join(sorted(map(str, dtypes)))}"
    if not x.shape[1]:
        return "H must not be zero"
    return refusal_of_sizes(x.shape[2], B.shape[2])


_native = dispatch.Implementation("bytekernels.ssd.native", devices=("cpu",), why_not=_why_not_native)
_implementations = dict(
    triton=dispatch.triton("ssd", _why_not_triton),
    native=_native,
    chunked=dispatch.Implementation("bytekernels.ssd.chunked"),
    reference=dispatch.reference("ssd"),
)
_forward = dispatch.Dispatch("ssd_scan", **_implementations)
_backward = dispatch.Dispatch("ssd_scan_backward", **_implementations)
_step = dispatch.Dispatch("mamba2_step", triton=dispatch.triton("ssd"), reference=dispatch.reference("ssd"))


@torch.library.custom_op("bytekernels::ssd_scan", mutates_args=())
def ssd_scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _forward(x, dt, A, B, C, cu_seqlens, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_states)


@ssd_scan_op.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    heads, headdim = x.shape[1:]
    states = (cu_seqlens.shape[0] - 1, heads, headdim, B.shape[2])
    return x.new_empty(x.shape), x.new_empty(states, dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("bytekernels::ssd_scan_backward", mutates_args=())
def ssd_scan_backward_op(
    dy: Tensor,
    dfinal_states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_states: Tensor | None,
) -> list[Tensor]:
    return _backward(
        dy, dfinal_states, x, dt, A, B, C, cu_seqlens, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_states
    )


@ssd_scan_backward_op.register_fake
def _(dy: Tensor, dfinal_states: Tensor, *inputs: Any) -> list[Tensor]:
    return dispatch.fake_gradients(inputs)


dispatch.register_gradients(ssd_scan_op, ssd_scan_backward_op)


@torch.library.custom_op("bytekernels::mamba2_step", mutates_args=("state",))
def mamba2_step_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    return _step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus, dt_min, dt_max)


@mamba2_step_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@overload
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[False] = ...,
) -> Tensor: ...


@overload
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    *,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba2's scan of each sequence of a packed batch.

    ``S_t = exp(Delta_t A) S_{t-1} + Delta_t x_t (x) B_t``, ``y_t = (S_t C_t + D x_t) silu(z_t)`` with
    ``Delta_t = clamp(softplus(dt_t + dt_bias))`` (Dao & Gu 2024, arXiv 2405.21060, equation 1 and section 7).
    States and sums are float32 (float64 for float64).

    Args:
        x: [T, H, P], a floating dtype. Rows of x, dt, B, C and z may be strided, as in a slice of columns.
        dt: [T, H], the time step before bias, softplus and clamp.
        A: [H], negative.
        B: [T, G, N], what a byte writes into the state; head h reads group ``h // (H / G)``.
        C: [T, G, N], what a byte reads from it.
        cu_seqlens: int32 [S+1], the offsets of the sequences.
        D: [H], the skip's weight, or None for no skip.
        z: [T, H, P], the gate, or None for no gate.
        dt_bias: [H] or None for zero.
        dt_softplus: whether Delta is the softplus of ``dt + dt_bias``, or that sum itself.
        dt_limit: least and greatest Delta; the least must not be negative.
        initial_states: [S, H, P, N] or None for zero.
        return_final_states: also return the state after each sequence's last byte.

    Returns:
        [T, H, P] in x's dtype, and with ``return_final_states`` the final states [S, H, P, N] in float32 (float64 for
        float64).

    Raises:
        TypeError: cu_seqlens not int32.
        ValueError: shapes that do not match, groups that do not divide the heads, limits or offsets out of order.
    """
    if x.dim() != 3:
        raise ValueError(f"x must have shape [T, H, P], got {list(x.shape)}")
    check_cu_seqlens(cu_seqlens, x.shape[0])
    _check("T", x, dt, A, B, C, D, z, dt_bias, dt_limit)
    states = (cu_seqlens.numel() - 1, *x.shape[1:], B.shape[2])
    if initial_states is not None and initial_states.shape != states:
        raise ValueError(
            f"initial_states must have shape [S, H, P, N] = {list(states)}, got {list(initial_states.shape)}"
        )
    low, high = map(float, dt_limit)
    y, final_states = ssd_scan_op(x, dt, A, B, C, cu_seqlens, D, z, dt_bias, dt_softplus, low, high, initial_states)
    return (y, final_states) if return_final_states else y


def mamba2_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """One byte for each of S sequences: :func:`ssd_scan` continued by a single step. Has no gradient.

    Args:
        x: [S, H, P], a floating dtype.
        dt: [S, H].
        A: [H], negative.
        B: [S, G, N].
        C: [S, G, N].
        state: float32 (float64 for float64) [S, H, P, N], contiguous, as ssd_scan's final states; updated in place.
        D, z, dt_bias, dt_softplus, dt_limit: as in :func:`ssd_scan`, with z [S, H, P].

    Returns:
        [S, H, P] in x's dtype.

    Raises:
        TypeError: a state of another dtype.
        ValueError: shapes that do not match, a state that is not contiguous, groups that do not divide the heads, or
            limits out of order.
    """
    if x.dim() != 3:
        raise ValueError(f"x must have shape [S, H, P], got {list(x.shape)}")
    _check("S", x, dt, A, B, C, D, z, dt_bias, dt_limit)
    if state.dtype != accumulation_dtype(x.dtype):
        raise TypeError(f"state must be {accumulation_dtype(x.dtype)} for x in {x.dtype}, got {state.dtype}")
    if state.shape != (*x.shape, B.shape[2]):
        raise ValueError(f"state must have shape [S, H, P, N] = {[*x.shape, B.shape[2]]}, got {list(state.shape)}")
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous, as it is updated in place, got strides {state.stride()}")
    low, high = map(float, dt_limit)
    return mamba2_step_op(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus, low, high)


def _check(
    axis: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
) -> None:
    """Refuse arguments whose shapes do not fit x's [rows, H, P]; ``axis`` names the rows."""
    rows, heads, _ = x.shape
    if dt.shape != (rows, heads):
        raise ValueError(f"dt must have shape [{axis}, H] = {[rows, heads]}, got {list(dt.shape)}")
    for name, value in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if value is not None and value.shape != (heads,):
            raise ValueError(f"{name} must have shape [H] = {[heads]}, got {list(value.shape)}")
    if B.dim() != 3 or B.shape[0] != rows:
        raise ValueError(f"B must have shape [{axis}, G, N] with {axis} = {rows}, got {list(B.shape)}")
    if B.shape[1] == 0 or heads % B.shape[1]:
        raise ValueError(f"B's {B.shape[1]} groups must divide the {heads} heads of x")
    if C.shape != B.shape:
        raise ValueError(f"C must have B's shape {list(B.shape)}, got {list(C.shape)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z must have x's shape {list(x.shape)}, got {list(z.shape)}")
    if not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (least, greatest) with 0 <= least <= greatest, got {dt_limit}")
