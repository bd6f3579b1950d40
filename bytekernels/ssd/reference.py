"""The scan as its recurrence, one byte at a time: the specification.

``S_t = exp(Delta_t A) S_{t-1} + Delta_t x_t (x) B_t``, ``y_t = (S_t C_t + D x_t) silu(z_t)``,
``Delta_t = clamp(softplus(dt_t + dt_bias))`` (Dao & Gu 2024, arXiv 2405.21060, equation 1 and section 7).
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from bytekernels import dispatch
from bytekernels.ragged import accumulation_dtype


def time_step(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    """``Delta``: [..., H] in the dtype that sums are carried in."""
    delta = dt.to(accumulation_dtype(dt.dtype))
    if dt_bias is not None:
        delta = delta + dt_bias.to(delta.dtype)
    return (F.softplus(delta) if dt_softplus else delta).clamp(dt_min, dt_max)


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
    _, heads, headdim = x.shape
    d_state, wide = B.shape[2], accumulation_dtype(x.dtype)
    delta = time_step(dt, dt_bias, dt_softplus, dt_min, dt_max).to(wide)  # [T, H]
    decay = (delta * A.to(wide)).exp()
    per_group = heads // B.shape[1]
    wide_B, wide_C = (value.to(wide).repeat_interleave(per_group, 1) for value in (B, C))  # [T, H, N]
    inflow = (delta[..., None] * x.to(wide)).unbind()  # T of [H, P]
    rows = list(zip(decay.unbind(), inflow, wide_B.unbind(), wide_C.unbind(), strict=True))

    outputs, states = [x.new_zeros(0, heads, headdim, dtype=wide)], []
    bounds = cu_seqlens.tolist()
    for sequence, (start, end) in enumerate(pairwise(bounds)):
        if initial_states is None:
            state = x.new_zeros(heads, headdim, d_state, dtype=wide)
        else:
            state = initial_states[sequence].to(wide)
        for keep, row, b, c in rows[start:end]:
            state = keep[:, None, None] * state + row[:, :, None] * b[:, None, :]  # [H, P, N]
            outputs.append((state * c[:, None, :]).sum(-1)[None])
        states.append(state)
    y = skip_and_gate(torch.cat(outputs), x, D, z)
    return y, torch.stack(states) if states else x.new_zeros(0, heads, headdim, d_state, dtype=wide)


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """``(y + D x) silu(z)`` in x's dtype, for y in the dtype that sums are carried in: [..., H, P]."""
    if D is not None:
        y = y + D.to(y.dtype)[:, None] * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def ssd_scan_backward(dy: Tensor, dfinal_states: Tensor, *args: object) -> list[Tensor]:
    return dispatch.vjp(ssd_scan, args, (dy, dfinal_states))


def mamba2_step(
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
    wide, per_group = state.dtype, x.shape[1] // B.shape[1]
    delta = time_step(dt, dt_bias, dt_softplus, dt_min, dt_max).to(wide)  # [S, H]
    wide_B, wide_C = (value.to(wide).repeat_interleave(per_group, 1) for value in (B, C))  # [S, H, N]
    decay = (delta * A.to(wide)).exp()
    inflow = (delta[:, :, None] * x.to(wide))[..., None] * wide_B[:, :, None, :]  # [S, H, P, N]
    state.mul_(decay[:, :, None, None]).add_(inflow)
    return skip_and_gate((state * wide_C[:, :, None, :]).sum(-1), x, D, z)
