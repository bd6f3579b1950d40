"""The mixer in Triton: the launchers of its rooms on columns of in_proj's output, and the single step.

z, xBC and dt are read where in_proj left them. The backward pass writes dz, dxBC and ddt where in_proj's own backward
reads them, into columns of one tensor. With ids the convolution reads its rows from the table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytekernels.byte_table import triton as table_room
from bytekernels.conv import triton as conv_room
from bytekernels.launch import on_device
from bytekernels.mixer.layout import channels, columns, spread
from bytekernels.norm import triton as norm_room
from bytekernels.ssd import triton as ssd_room
from bytekernels.ssd.triton.chunk import clamp, silu, softplus

BLOCK = 8192  # elements of a state that a program of the step holds: 32 float32 registers a thread at 8 warps


@triton.jit
def _convolved(p_row, p_ring, p_weight, p_bias, o_c, m_c, is_owner, position, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """silu(bias + sum_j w_j row_{-j}), rounded as the row is; the new row goes into the ring, from its owner."""
    b_new = tl.load(p_row + o_c, mask=m_c, other=0.0)
    b_sum = tl.load(p_weight + o_c * K + (K - 1), mask=m_c, other=0.0).to(tl.float32) * b_new.to(tl.float32)
    for j in tl.static_range(1, K):
        b_w = tl.load(p_weight + o_c * K + (K - 1 - j), mask=m_c, other=0.0).to(tl.float32)
        b_sum += b_w * tl.load(p_ring + o_c * K + (position + K - j) % K, mask=m_c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_sum += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_ring + o_c * K + position % K, b_new, mask=m_c & is_owner)
    return silu(b_sum).to(b_new.dtype).to(tl.float32)


@triton.heuristics(
    {
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
        "HAS_D": lambda args: args["p_D"] is not None,
        "HAS_DT_BIAS": lambda args: args["p_dt_bias"] is not None,
        "HAS_ACTIVE": lambda args: args["p_active"] is not None,
    }
)
@triton.jit
def step_kernel(
    p_zxbcdt,
    p_weight,
    p_bias,
    p_A,
    p_D,
    p_dt_bias,
    p_conv,
    p_position,
    p_ssm,
    p_active,
    p_y,
    stride,
    dt_min,
    dt_max,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """x, B, C = silu(conv); S = exp(Delta A) S + Delta x (x) B; y = S C + D x: one head of one sequence.

    Channels that heads share go into the ring from the first head of their group. A sequence that is not active keeps
    its state, and its y is not written.
    """
    i_s = (tl.program_id(0) // H).to(tl.int64)
    if HAS_ACTIVE and tl.load(p_active + i_s) == 0:
        return
    i_h = tl.program_id(0) % H
    i_g = i_h // (H // GROUPS)
    CHANNELS: tl.constexpr = H * P + 2 * GROUPS * N
    position = tl.load(p_position + i_s * H + i_h)
    p_row = p_zxbcdt + i_s * stride + H * P
    p_ring = p_conv + i_s * CHANNELS * K

    dt = tl.load(p_row + CHANNELS + i_h).to(tl.float32)
    if HAS_DT_BIAS:
        dt += tl.load(p_dt_bias + i_h).to(tl.float32)
    delta = clamp(softplus(dt), dt_min, dt_max)
    decay = tl.exp(delta * tl.load(p_A + i_h).to(tl.float32))
    skip = tl.load(p_D + i_h).to(tl.float32) if HAS_D else 0.0

    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    is_first = i_h % (H // GROUPS) == 0
    o_b = H * P + i_g * N + o_n
    b_b = _convolved(p_row, p_ring, p_weight, p_bias, o_b, m_n, is_first, position, K, HAS_BIAS)  # [BLOCK_N]
    b_c = _convolved(p_row, p_ring, p_weight, p_bias, o_b + GROUPS * N, m_n, is_first, position, K, HAS_BIAS)
    for i_p in range(0, P, BLOCK_P):
        o_p = i_p + tl.arange(0, BLOCK_P)
        m_p = o_p < P
        b_x = _convolved(p_row, p_ring, p_weight, p_bias, i_h * P + o_p, m_p, True, position, K, HAS_BIAS)  # [BLOCK_P]
        p_state = p_ssm + ((i_s * H + i_h) * P + o_p[:, None]) * N + o_n[None, :]
        m_state = m_p[:, None] & m_n[None, :]
        b_state = tl.load(p_state, mask=m_state, other=0.0)
        b_state = decay * b_state + (delta * b_x)[:, None] * b_b[None, :]  # [BLOCK_P, BLOCK_N]
        tl.store(p_state, b_state, mask=m_state)
        b_y = tl.sum(b_state * b_c[None, :], 1) + skip * b_x
        tl.store(p_y + (i_s * H + i_h) * P + o_p, b_y, mask=m_p)
    tl.debug_barrier()  # every thread has read the position
    tl.store(p_position + i_s * H + i_h, (position + 1) % K)


def mamba2_mixer(
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
    inner = norm_weight.shape[0]
    z, xbc, dt = _columns(zxbcdt, inner, A.shape[0], ids)
    conved, final_conv = conv_room.causal_conv1d(xbc, conv_weight, conv_bias, cu_seqlens, True, conv_states, ids=ids)
    x, B, C = channels(conved, inner, head_dim, num_groups)
    y, final_ssm = ssd_room.ssd_scan(x, dt, A, B, C, cu_seqlens, D, None, dt_bias, True, dt_min, dt_max, ssm_states)
    y = y.flatten(1)
    return norm_room.gated_rms_norm(y, z, norm_weight, inner // num_groups, eps), y, conved, final_conv, final_ssm


def mamba2_mixer_backward(
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
    inner, heads = norm_weight.shape[0], A.shape[0]
    z, xbc, dt = _columns(zxbcdt, inner, heads, ids)
    x, B, C = channels(conved, inner, head_dim, num_groups)
    dzxbcdt = zxbcdt.new_empty(len(y), zxbcdt.shape[1])
    dz, dxbc, ddt = columns(dzxbcdt, inner, heads)
    dconved = torch.empty_like(conved)
    dx, dB, dC = channels(dconved, inner, head_dim, num_groups)

    dy, _, dnorm_weight = norm_room.gated_rms_norm_backward(dout, y, z, norm_weight, inner // num_groups, eps, dz=dz)
    scan = (x, dt, A, B, C, cu_seqlens, D, None, dt_bias, True, dt_min, dt_max, ssm_states)
    gradients = ssd_room.ssd_scan_backward(dy.view_as(x), dssm_states, *scan, dx=dx, dB=dB, dC=dC, ddt=ddt)
    _, _, dA, _, _, dD, ddt_bias, dssm = spread(gradients, (x, dt, A, B, C, D, dt_bias, ssm_states))
    gradients = conv_room.causal_conv1d_backward(
        dconved, dconv_states, xbc, conv_weight, conv_bias, cu_seqlens, True, conv_states, ids=ids, dx=dxbc
    )
    _, dweight, dbias, dconv = spread(gradients, (xbc, conv_weight, conv_bias, conv_states))
    if ids is not None:
        dzxbcdt = table_room.byte_table_backward(dzxbcdt, ids)
    found = [dzxbcdt, dweight, dbias, dA, dD, ddt_bias, dnorm_weight, dconv, dssm]
    return [gradient for gradient in found if gradient is not None]


def mamba2_mixer_step(
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
    sequences, heads, _, d_state = ssm.shape
    inner, taps = heads * head_dim, conv.shape[2]
    zxbcdt = zxbcdt if zxbcdt.stride(1) == 1 else zxbcdt.contiguous()
    optional = conv_bias, D, dt_bias, active
    conv_bias, D, dt_bias, active = (None if value is None else value.contiguous() for value in optional)
    y = zxbcdt.new_empty(sequences, inner)
    block_n = triton.next_power_of_2(d_state)
    block_p = max(1, min(triton.next_power_of_2(head_dim), BLOCK // block_n))
    with on_device(zxbcdt):
        if sequences:
            step_kernel[(sequences * heads,)](
                zxbcdt,
                conv_weight.contiguous(),
                conv_bias,
                A.contiguous(),
                D,
                dt_bias,
                conv,
                position,
                ssm,
                active,
                y,
                zxbcdt.stride(0),
                dt_min,
                dt_max,
                H=heads,
                P=head_dim,
                N=d_state,
                GROUPS=num_groups,
                K=taps,
                BLOCK_P=block_p,
                BLOCK_N=block_n,
                num_warps=max(1, min(8, block_p * block_n // 256)),
            )
    return norm_room.gated_rms_norm(y, zxbcdt[:, :inner], norm_weight, inner // num_groups, eps, active=active)


def _columns(zxbcdt: Tensor, inner: int, heads: int, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """z [T, inner], xBC, dt [T, H]; with ids z and dt are rows for each byte, and xBC stays a table [256, C]."""
    zxbcdt = zxbcdt if zxbcdt.stride(1) == 1 else zxbcdt.contiguous()
    z, xbc, dt = columns(zxbcdt, inner, heads)
    if ids is not None:
        z, dt = (table_room.byte_table(ids, part) for part in (z, dt))
    return z, xbc, dt
