"""The mixer and its single step as torch.library ops."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.mixer.checks import check_shape, check_sizes, limits_of
from bytekernels.mixer.state import MixerState, MixerStates
from bytekernels.ragged import accumulation_dtype, check_bytes, check_cu_seqlens


def _refusal_of_taps(conv_weight: Tensor) -> str | None:
    taps = conv_weight.shape[1]
    return None if 2 <= taps <= 4 else f"conv_weight must have 2 to 4 taps, got {taps}"


def _why_not_native(*args: Any) -> str | None:
    """Why the extension can't serve these arguments of mamba2_mixer, or of its backward, or None."""
    return _refusal_of_rows(args[-16]) or _refusal_of_taps(args[-15]) or dispatch.extension_refusal()


def _why_not_native_step(zxbcdt: Tensor, conv_weight: Tensor, *_: Any) -> str | None:
    return _refusal_of_rows(zxbcdt) or _refusal_of_taps(conv_weight) or dispatch.extension_refusal()


def _refusal_of_rows(zxbcdt: Tensor) -> str | None:
    if zxbcdt.dtype not in (torch.float32, torch.bfloat16):
        return f"zxbcdt must be float32 or bfloat16, got {zxbcdt.dtype}"
    return None


def _why_not_triton(*args: Any) -> str | None:
    from bytekernels.ssd.triton import refusal_of_sizes  # here, where Triton is known to be installed

    conv_weight, norm_weight, head_dim, num_groups = (args[i] for i in (-15, -10, -8, -7))
    state_size = (conv_weight.shape[0] - norm_weight.shape[0]) // (2 * num_groups)
    return refusal_of_sizes(head_dim, state_size) or _refusal_of_taps(conv_weight)


_implementations = dict(
    triton=dispatch.triton("mixer", _why_not_triton),
    native=dispatch.Implementation("bytekernels.mixer.native", devices=("cpu",), why_not=_why_not_native),
    chunked=dispatch.Implementation("bytekernels.mixer.chunked"),
    reference=dispatch.reference("mixer"),
)
_forward = dispatch.Dispatch("mamba2_mixer", **_implementations)
_backward = dispatch.Dispatch("mamba2_mixer_backward", **_implementations)
_step = dispatch.Dispatch(
    "mamba2_mixer_step",
    triton=dispatch.triton("mixer"),
    native=dispatch.Implementation("bytekernels.mixer.native", devices=("cpu",), why_not=_why_not_native_step),
    reference=dispatch.reference("mixer"),
)


@torch.library.custom_op("bytekernels::mamba2_mixer", mutates_args=())
def mamba2_mixer_op(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    head_dim: int,
    num_groups: int,
    eps: float,
    dt_min: float,
    dt_max: float,
    ids: Tensor | None,
    conv_states: Tensor | None,
    ssm_states: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = conv_weight, conv_bias, A, D, dt_bias, norm_weight
    options = head_dim, num_groups, eps, dt_min, dt_max
    out, y, conved, final_conv, final_ssm = _forward(
        zxbcdt, *parameters, cu_seqlens, *options, ids, conv_states, ssm_states
    )
    return out.contiguous(), y.contiguous(), conved.contiguous(), final_conv, final_ssm


@mamba2_mixer_op.register_fake
def _(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    head_dim: int,
    num_groups: int,
    eps: float,
    dt_min: float,
    dt_max: float,
    ids: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total, sequences = (zxbcdt if ids is None else ids).shape[0], cu_seqlens.shape[0] - 1
    inner, (channels, taps) = norm_weight.shape[0], conv_weight.shape
    state_size = (channels - inner) // (2 * num_groups)
    return (
        zxbcdt.new_empty(total, inner),
        zxbcdt.new_empty(total, inner),
        zxbcdt.new_empty(total, channels),
        zxbcdt.new_empty(sequences, channels, taps - 1),
        zxbcdt.new_empty(sequences, A.shape[0], head_dim, state_size, dtype=accumulation_dtype(zxbcdt.dtype)),
    )


@torch.library.custom_op("bytekernels::mamba2_mixer_backward", mutates_args=())
def mamba2_mixer_backward_op(
    dout: Tensor,
    dconv_states: Tensor | None,
    dssm_states: Tensor | None,
    y: Tensor,
    conved: Tensor,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    head_dim: int,
    num_groups: int,
    eps: float,
    dt_min: float,
    dt_max: float,
    ids: Tensor | None,
    conv_states: Tensor | None,
    ssm_states: Tensor | None,
) -> list[Tensor]:
    parameters = conv_weight, conv_bias, A, D, dt_bias, norm_weight
    options = head_dim, num_groups, eps, dt_min, dt_max
    inputs = zxbcdt, *parameters, cu_seqlens, *options, ids, conv_states, ssm_states
    return _backward(dout, dconv_states, dssm_states, y, conved, *inputs)


@mamba2_mixer_backward_op.register_fake
def _(
    dout: Tensor, dconv_states: Tensor | None, dssm_states: Tensor | None, y: Tensor, conved: Tensor, *inputs: Any
) -> list[Tensor]:
    return dispatch.fake_gradients(inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The convolution's output is kept, not computed again: the forward writes it anyway, and a second [T, C] read and
    # write costs more time than its memory, a quarter of what is saved, is worth.
    _, y, conved, _, _ = output
    ctx.mark_non_differentiable(y, conved)
    ctx.set_materialize_grads(False)
    ctx.is_tensor = tuple(isinstance(value, Tensor) for value in inputs)
    ctx.others = tuple(value for value in inputs if not isinstance(value, Tensor))
    ctx.save_for_backward(y, conved, *(value for value in inputs if isinstance(value, Tensor)))


def _differentiate(
    ctx: Any, dout: Tensor | None, _y: None, _conved: None, dconv: Tensor | None, dssm: Tensor | None
) -> tuple[Tensor | None, ...]:
    y, conved, *tensors = ctx.saved_tensors
    saved, others = iter(tensors), iter(ctx.others)
    inputs = [next(saved) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
    dout = torch.zeros_like(y) if dout is None else dout.contiguous()
    dconv, dssm = (None if value is None else value.contiguous() for value in (dconv, dssm))
    gradients = iter(mamba2_mixer_backward_op(dout, dconv, dssm, y, conved, *inputs))
    return tuple(
        next(gradients) if isinstance(value, Tensor) and value.is_floating_point() else None for value in inputs
    )


mamba2_mixer_op.register_autograd(_differentiate, setup_context=_setup)


def _take_step(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    conv: Tensor,
    position: Tensor,
    ssm: Tensor,
    head_dim: int,
    num_groups: int,
    eps: float,
    dt_min: float,
    dt_max: float,
    active: Tensor | None,
) -> Tensor:
    parameters = conv_weight, conv_bias, A, D, dt_bias, norm_weight
    options = head_dim, num_groups, eps, dt_min, dt_max, active
    out = _step(zxbcdt, *parameters, conv, position, ssm, *options).contiguous()
    torch.autograd.graph.increment_version((conv, position, ssm))
    return out


# Defined by hand: torch.library.custom_op would add several times what the step takes on a CPU, as it looks through
# the schema at each call for the arguments that are changed.
_STEP = "bytekernels::mamba2_mixer_step"
torch.library.define(
    _STEP,
    torch.library.infer_schema(_take_step, mutates_args=("conv", "position", "ssm")),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl(_STEP, "default", _take_step)
mamba2_mixer_step_op = torch.ops.bytekernels.mamba2_mixer_step.default


@torch.library.register_fake(_STEP)
def _(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    *_: Any,
) -> Tensor:
    return zxbcdt.new_empty(zxbcdt.shape[0], norm_weight.shape[0])


@overload
def mamba2_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    *,
    head_dim: int,
    num_groups: int,
    eps: float = ...,
    dt_limit: tuple[float, float] = ...,
    ids: Tensor | None = ...,
    initial_states: MixerStates | None = ...,
    return_final_states: Literal[False] = ...,
) -> Tensor: ...


@overload
def mamba2_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    *,
    head_dim: int,
    num_groups: int,
    eps: float = ...,
    dt_limit: tuple[float, float] = ...,
    ids: Tensor | None = ...,
    initial_states: MixerStates | None = ...,
    return_final_states: Literal[True],
) -> tuple[Tensor, MixerStates]: ...


def mamba2_mixer(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor,
    *,
    head_dim: int,
    num_groups: int,
    eps: float = 1e-5,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    ids: Tensor | None = None,
    initial_states: MixerStates | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, MixerStates]:
    """Mamba2's mixer between in_proj and out_proj, for each sequence of a packed batch.

    ``norm(y silu(z)) norm_weight`` in G groups, where y is the scan with skip D of ``silu(conv(x | B | C))`` and
    ``softplus(dt + dt_bias)`` (Dao & Gu 2024, arXiv 2405.21060, section 7.1): :func:`causal_conv1d`, :func:`ssd_scan`
    and :func:`gated_rms_norm` in one op, whose gradient is written once.

    Args:
        zxbcdt: [T, W], a floating dtype; in_proj's output, columns ``z | x | B | C | dt`` of widths H*P, H*P, G*N, G*N
            and H. With ``ids`` a table [256, W] of such rows by byte value.
        conv_weight: [C, K], C = H*P + 2*G*N.
        conv_bias: [C] or None.
        A: [H], negative.
        D: [H], the skip's weight, or None for no skip.
        dt_bias: [H] or None for zero.
        norm_weight: [H*P].
        cu_seqlens: int32 [S+1], the offsets of the sequences.
        head_dim: P.
        num_groups: G; head h reads the B and C of group ``h // (H / G)``.
        eps: added to the mean square.
        dt_limit: least and greatest time step; the least must not be negative.
        ids: uint8 [T] or None. Row t is ``zxbcdt[ids[t]]``, as it is where nothing but the byte is known.
        initial_states: conv [S, C, K-1] and ssm [S, H, P, N], or None for zero.
        return_final_states: also return the states after each sequence's last byte.

    Returns:
        [T, H*P] in zxbcdt's dtype, and with ``return_final_states`` conv [S, C, K-1] in zxbcdt's dtype and ssm
        [S, H, P, N] in float32 (float64 for float64).

    Raises:
        TypeError: cu_seqlens not int32, ids not uint8, or zxbcdt not floating.
        ValueError: shapes that do not match, groups that do not divide the heads, limits or offsets out of order.
    """
    names = "T" if ids is None else "256"
    state_size = check_sizes(names, zxbcdt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, head_dim, num_groups)
    low, high = limits_of(dt_limit)
    if ids is not None:
        check_bytes(ids)
        if ids.dim() != 1:
            raise ValueError(f"ids must have shape [T], got {list(ids.shape)}")
        if zxbcdt.shape[0] != 256:
            raise ValueError(f"zxbcdt must have shape [256, W] with ids, a row a byte, got {list(zxbcdt.shape)}")
    check_cu_seqlens(cu_seqlens, (zxbcdt if ids is None else ids).shape[0])
    if initial_states is not None:
        sequences, (channels, taps) = cu_seqlens.numel() - 1, conv_weight.shape
        check_shape("initial_states.conv", initial_states.conv, "[S, C, K-1]", [sequences, channels, taps - 1])
        states = [sequences, A.shape[0], head_dim, state_size]
        check_shape("initial_states.ssm", initial_states.ssm, "[S, H, P, N]", states)
    parameters = conv_weight, conv_bias, A, D, dt_bias, norm_weight
    options = head_dim, num_groups, eps, low, high
    conv, ssm = (None, None) if initial_states is None else initial_states
    out, _, _, final_conv, final_ssm = mamba2_mixer_op(zxbcdt, *parameters, cu_seqlens, *options, ids, conv, ssm)
    return (out, MixerStates(final_conv, final_ssm)) if return_final_states else out


def mamba2_mixer_step(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    state: MixerState,
    *,
    head_dim: int,
    num_groups: int,
    eps: float = 1e-5,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    active: Tensor | None = None,
) -> Tensor:
    """One byte for each of S sequences: :func:`mamba2_mixer` continued by a single row. Has no gradient.

    Args:
        zxbcdt: [S, W], a floating dtype.
        conv_weight, conv_bias, A, D, dt_bias, norm_weight, head_dim, num_groups, eps, dt_limit: as in
            :func:`mamba2_mixer`.
        state: updated in place; conv [S, C, K], position int32 [S, H], ssm [S, H, P, N], each contiguous.

        active: bool [S] or None for all. Where it is False the state keeps its bits, whatever the row of zxbcdt holds,
            and the row of the output is zero.

    Returns:
        [S, H*P] in zxbcdt's dtype.

    Raises:
        TypeError: a state of another dtype, active not bool, or zxbcdt not floating.
        ValueError: shapes that do not match, a state that is not contiguous, groups that do not divide the heads, or
            limits out of order.
    """
    state_size = check_sizes("S", zxbcdt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, head_dim, num_groups)
    low, high = limits_of(dt_limit)
    sequences, heads, wide = zxbcdt.shape[0], A.shape[0], accumulation_dtype(zxbcdt.dtype)
    for name, value, names, shape, dtype in (
        ("conv", state.conv, "[S, C, K]", [sequences, *conv_weight.shape], wide),
        ("position", state.position, "[S, H]", [sequences, heads], torch.int32),
        ("ssm", state.ssm, "[S, H, P, N]", [sequences, heads, head_dim, state_size], wide),
    ):
        check_shape(f"state.{name}", value, names, shape)
        if value.dtype != dtype:
            raise TypeError(f"state.{name} must be {dtype} for zxbcdt in {zxbcdt.dtype}, got {value.dtype}")
        if not value.is_contiguous():
            raise ValueError(f"state.{name} must be contiguous, got strides {list(value.stride())}: use .contiguous()")
    if active is not None:
        if active.dtype != torch.bool:
            raise TypeError(f"active must be bool, got {active.dtype}: use active.bool()")
        check_shape("active", active, "[S]", [sequences])
    parameters = conv_weight, conv_bias, A, D, dt_bias, norm_weight
    options = head_dim, num_groups, eps, low, high, active
    return mamba2_mixer_step_op(zxbcdt, *parameters, state.conv, state.position, state.ssm, *options)
