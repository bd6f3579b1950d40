"""mamba2_step in Triton: one launch, each program a block of one head's state, which is read and written once."""

import triton
import triton.language as tl
from torch import Tensor

from bytekernels.launch import on_device, with_dense_rows
from bytekernels.ssd.triton.chunk import clamp, silu, softplus

BLOCK = 2048  # elements of the state that a program holds: 16 float32 registers a thread at 4 warps


@triton.heuristics(
    {
        "HAS_D": lambda args: args["p_D"] is not None,
        "HAS_Z": lambda args: args["p_z"] is not None,
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
    }
)
@triton.jit
def step_kernel(
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_state,
    p_D,
    p_z,
    p_bias,
    p_y,
    stride_x,
    stride_dt,
    stride_B,
    stride_C,
    stride_z,
    dt_min,
    dt_max,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """S = exp(Delta A) S + Delta x (x) B, y = (S C + D x) silu(z)."""
    i_block = tl.program_id(0)
    i_h = i_block // tl.cdiv(P, BLOCK_P) % H
    i_s = (i_block // (tl.cdiv(P, BLOCK_P) * H)).to(tl.int64)
    o_p = i_block % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    m_p, m_n = o_p < P, o_n < N
    o_hp = i_h * P + o_p
    o_gn = i_h // (H // G) * N + o_n

    delta = tl.load(p_dt + i_s * stride_dt + i_h).to(tl.float32)
    if HAS_BIAS:
        delta += tl.load(p_bias + i_h).to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta)
    delta = clamp(delta, dt_min, dt_max)
    b_x = tl.load(p_x + i_s * stride_x + o_hp, mask=m_p, other=0.0).to(tl.float32)
    b_B = tl.load(p_B + i_s * stride_B + o_gn, mask=m_n, other=0.0).to(tl.float32)
    b_C = tl.load(p_C + i_s * stride_C + o_gn, mask=m_n, other=0.0).to(tl.float32)
    p_block = p_state + (i_s * (H * P) + o_hp[:, None]) * N + o_n[None, :]  # [BLOCK_P, BLOCK_N]
    m_block = m_p[:, None] & m_n[None, :]
    b_state = tl.load(p_block, mask=m_block, other=0.0)
    b_state = tl.exp(delta * tl.load(p_A + i_h).to(tl.float32)) * b_state + (delta * b_x)[:, None] * b_B[None, :]
    tl.store(p_block, b_state, mask=m_block)

    b_y = tl.sum(b_state * b_C[None, :], 1)
    if HAS_D:
        b_y += tl.load(p_D + i_h).to(tl.float32) * b_x
    if HAS_Z:
        b_y *= silu(tl.load(p_z + i_s * stride_z + o_hp, mask=m_p, other=0.0).to(tl.float32))
    tl.store(p_y + i_s * (H * P) + o_hp, b_y, mask=m_p)


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
    sequences, heads, headdim = x.shape
    groups, d_state = B.shape[1:]
    y = x.new_empty(x.shape)
    x, dt, B, C, A = *(with_dense_rows(value) for value in (x, dt, B, C)), A.contiguous()
    z = None if z is None else with_dense_rows(z)
    D, dt_bias = (None if value is None else value.contiguous() for value in (D, dt_bias))
    block_n = triton.next_power_of_2(max(1, d_state))
    block_p = max(1, min(triton.next_power_of_2(max(1, headdim)), BLOCK // block_n))
    with on_device(x):
        if y.numel():
            step_kernel[(sequences * heads * triton.cdiv(headdim, block_p),)](
                x,
                dt,
                A,
                B,
                C,
                state,
                D,
                z,
                dt_bias,
                y,
                x.stride(0),
                dt.stride(0),
                B.stride(0),
                C.stride(0),
                0 if z is None else z.stride(0),
                dt_min,
                dt_max,
                H=heads,
                P=headdim,
                G=groups,
                N=d_state,
                SOFTPLUS=dt_softplus,
                BLOCK_P=block_p,
                BLOCK_N=block_n,
                num_warps=4,
            )
    return y
