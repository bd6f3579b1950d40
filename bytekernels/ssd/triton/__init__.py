"""The scan in Triton.

Three tilings of each sequence, all from its first byte: *chunks* of Q bytes, the unit of matrix products; *spans* of
two chunks, at which the backward pass keeps states; *segments* of SEGMENT bytes, one program each and head. Sequences
longer than a segment get a walk over states alone beforehand. Tiles are numbered as ``launch.sequence_of_tile`` says.
"""

import torch
from torch import Tensor

from bytekernels.launch import on_device, with_dense_rows
from bytekernels.ssd.triton.call import Call
from bytekernels.ssd.triton.step import mamba2_step

__all__ = ["mamba2_step", "refusal_of_sizes", "ssd_scan", "ssd_scan_backward"]

GREATEST_HEADDIM, GREATEST_STATE = 64, 128  # a program holds whole rows of both; larger ones spill or do not fit a chip


def refusal_of_sizes(headdim: int, d_state: int) -> str | None:
    """Why the scan's kernels do not take these P and N, or None."""
    if 0 < headdim <= GREATEST_HEADDIM and 0 < d_state <= GREATEST_STATE:
        return None
    return f"takes P from 1 to {GREATEST_HEADDIM} and N from 1 to {GREATEST_STATE}, got P = {headdim}, N = {d_state}"


def ssd_scan(
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
    call = Call(x, dt, A, B, C, cu_seqlens, D, dt_bias, dt_softplus, (dt_min, dt_max))
    z = None if z is None else with_dense_rows(z)
    initial_states = None if initial_states is None else initial_states.contiguous()
    y = x.new_empty(x.shape)
    final_states = x.new_empty(call.sequences, *call.state_shape, dtype=torch.float32)
    with on_device(x):
        call.scan(z, initial_states, y, final_states)
    return y, final_states


def ssd_scan_backward(
    dy: Tensor,
    dfinal_states: Tensor | None,
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
    *,
    dx: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    ddt: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the inputs in their order; dx, dB, dC and ddt are written where given, their rows at any stride.

    States are walked again rather than kept from the forward pass. With a gate, so is y: the scan is run once more.
    """
    call = Call(x, dt, A, B, C, cu_seqlens, D, dt_bias, dt_softplus, (dt_min, dt_max))
    dy = dy.contiguous()
    dfinal_states, initial_states = (
        None if value is None else value.contiguous() for value in (dfinal_states, initial_states)
    )
    dx, dB, dC, ddt = (
        value.new_empty(value.shape) if out is None else out for value, out in ((x, dx), (B, dB), (C, dC), (dt, ddt))
    )
    dz = None if z is None else z.new_empty(z.shape)
    dinitial = None if initial_states is None else torch.empty_like(initial_states, dtype=torch.float32)
    states, costates = (x.new_empty(call.tiles(2 * call.chunk), *call.state_shape) for _ in range(2))
    with on_device(x):
        if z is not None and dz is not None:
            y, _ = ssd_scan(x, dt, A, B, C, cu_seqlens, D, None, dt_bias, dt_softplus, dt_min, dt_max, initial_states)
            call.gate(dy, with_dense_rows(z), y, dz)
            dy = y
        call.walk(None, initial_states, states, None)
        call.walk(dy, dfinal_states, costates, dinitial)
        sums = call.inputs(dy, states, costates, dx, ddt)
        call.outer(dy, states, costates, dB, dC)
    dA, dD, dbias = (
        None if like is None else torch.empty_like(like).copy_(part)
        for part, like in zip(sums, (call.A, call.D, call.bias), strict=True)
    )
    if dinitial is not None and initial_states is not None:
        dinitial = dinitial.to(initial_states.dtype)
    gradients = [dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial]
    return [gradient for gradient in gradients if gradient is not None]
