"""The causal convolution as torch.library ops."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.ragged import check_cu_seqlens


def implementations(
    x_and_weight: Callable[..., tuple[Tensor, Tensor]], *, native: bool = True
) -> dict[str, dispatch.Implementation]:
    """The room's implementations, best first, of an op among whose arguments x (or the table) and the weight are."""

    def refusal_of_taps(*args: Any) -> str | None:
        taps = x_and_weight(*args)[1].shape[1]
        return None if 2 <= taps <= 4 else f"weight must have 2 to 4 taps, got {taps}"

    def why_not_native(*args: Any) -> str | None:
        dtype = x_and_weight(*args)[0].dtype
        if dtype not in (torch.float32, torch.bfloat16):
            return f"x must be float32 or bfloat16, got {dtype}"
        return refusal_of_taps(*args) or dispatch.extension_refusal()

    extension = dispatch.Implementation("bytekernels.conv.native", devices=("cpu",), why_not=why_not_native)
    return {
        "triton": dispatch.triton("conv", refusal_of_taps),
        **({"native": extension} if native else {}),
        "reference": dispatch.reference("conv"),
    }


_implementations = implementations(lambda *args: args[-6:-4])
_forward = dispatch.Dispatch("causal_conv1d", **_implementations)
_backward = dispatch.Dispatch("causal_conv1d_backward", **_implementations)
_step = dispatch.Dispatch(
    "causal_conv1d_step", **implementations(lambda x, conv_state, weight, *_: (x, weight), native=False)
)


@torch.library.custom_op("bytekernels::causal_conv1d", mutates_args=())
def causal_conv1d_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool, initial_states: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, bias, cu_seqlens, silu, initial_states)


@causal_conv1d_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    channels, width = weight.shape
    return x.new_empty(x.shape), x.new_empty(cu_seqlens.shape[0] - 1, channels, width - 1)


@torch.library.custom_op("bytekernels::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward_op(
    dy: Tensor,
    dfinal_states: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    silu: bool,
    initial_states: Tensor | None,
) -> list[Tensor]:
    return _backward(dy, dfinal_states, x, weight, bias, cu_seqlens, silu, initial_states)


@causal_conv1d_backward_op.register_fake
def _(dy: Tensor, dfinal_states: Tensor, *inputs: Any) -> list[Tensor]:
    return dispatch.fake_gradients(inputs)


dispatch.register_gradients(causal_conv1d_op, causal_conv1d_backward_op)


@torch.library.custom_op("bytekernels::causal_conv1d_step", mutates_args=("conv_state",))
def causal_conv1d_step_op(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return _step(x, conv_state, weight, bias, silu)


@causal_conv1d_step_op.register_fake
def _(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    activation: str | None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[False] = ...,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    activation: str | None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    activation: str | None = "silu",
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution of each sequence of a packed batch.

    ``y[t, c] = act(bias[c] + sum_j weight[c, K-1-j] x[t-j, c])`` with j from 0 to K-1; rows before a sequence's first
    are its initial state's, or zero (Gu & Dao 2023, arXiv 2312.00752, section 3.4). Sums are carried in float32
    (float64 for float64).

    Args:
        x: [T, C], a floating dtype. Rows may be strided, as in a slice of columns.
        weight: [C, K].
        bias: [C] or None.
        cu_seqlens: int32 [S+1], the offsets of the sequences.
        activation: "silu" or None.
        initial_states: [S, C, K-1], the rows before each sequence, oldest first; rounded to x's dtype.
        return_final_states: also return the rows that a continuation of each sequence needs.

    Returns:
        [T, C] in x's dtype, and with ``return_final_states`` the final states [S, C, K-1] in x's dtype.

    Raises:
        TypeError: cu_seqlens not int32.
        ValueError: shapes that do not match, offsets out of order, or another activation.
    """
    if x.dim() != 2:
        raise ValueError(f"x must have shape [T, C], got {list(x.shape)}")
    total, channels = x.shape
    check_parameters(channels, weight, bias, activation)
    check_cu_seqlens(cu_seqlens, total)
    expected = (cu_seqlens.numel() - 1, channels, weight.shape[1] - 1)
    if initial_states is not None and initial_states.shape != expected:
        raise ValueError(
            f"initial_states must have shape [S, C, K-1] = {list(expected)}, got {list(initial_states.shape)}"
        )
    y, final_states = causal_conv1d_op(x, weight, bias, cu_seqlens, activation == "silu", initial_states)
    return (y, final_states) if return_final_states else y


def causal_conv1d_step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None = "silu"
) -> Tensor:
    """One row for each of S sequences: :func:`causal_conv1d` continued by a single byte. Has no gradient.

    Args:
        x: [S, C], a floating dtype.
        conv_state: [S, C, K-1], the rows before, oldest first; moved on by one row in place.
        weight: [C, K].
        bias: [C] or None.
        activation: "silu" or None.

    Returns:
        [S, C] in x's dtype.

    Raises:
        ValueError: shapes that do not match, or another activation.
    """
    if x.dim() != 2:
        raise ValueError(f"x must have shape [S, C], got {list(x.shape)}")
    check_parameters(x.shape[1], weight, bias, activation)
    expected = (*x.shape, weight.shape[1] - 1)
    if conv_state.shape != expected:
        raise ValueError(f"conv_state must have shape [S, C, K-1] = {list(expected)}, got {list(conv_state.shape)}")
    return causal_conv1d_step_op(x, conv_state, weight, bias, activation == "silu")


def check_parameters(channels: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must have shape [C, K] with C = {channels} and K >= 1, got {list(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have shape [{channels}], got {list(bias.shape)}")
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
