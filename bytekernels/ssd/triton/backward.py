"""Gradients of the scan, chunk by chunk, from the start states and their gradients at every other chunk.

With S0 the state before a chunk, G = dL/dS after it, ``L_ts = exp(cs_t - cs_s)`` for t >= s and dy the gradient of
its y:

    v_s  = sum_{t>=s} L_ts (C_t . B_s) dy_t + exp(cs_Q - cs_s) G B_s        dx_s = Delta_s v_s + D dy_s
    dB_s = sum_h sum_{t>=s} L_ts Delta_s (dy_t . x_s) C_t + exp(cs_Q - cs_s) Delta_s x_s G
    dC_t = sum_h sum_{s<=t} L_ts Delta_s (dy_t . x_s) B_s + exp(cs_t) dy_t S0
    da_t = exp(cs_Q) <G, S0> + sum_{u>=t} exp(cs_u) dy_u . (S0 C_u) + sum_{s<t} Delta_s exp(cs_Q - cs_s) x_s . (G B_s)
           + sum_{u>=t>s} L_us (C_u . B_s) Delta_s (dy_u . x_s)
    dDelta_s = x_s . v_s + A da_s        dA = sum_t Delta_t da_t

A span is two chunks. The states in its middle are rebuilt: S0 of the second chunk from the first, G of the first from
the second.
"""

import triton
import triton.language as tl

from bytekernels.ssd.triton.chunk import (
    decay,
    decayed,
    load_rows,
    running_sum,
    store_rows,
    tile,
    time_step,
)
from bytekernels.ssd.triton.states import chunk_gain


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    p_dy, p_y, p_z, p_dz, rows, stride_z, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """y is replaced by its gradient, that of y silu(z) being dy; dz = dy y silu'(z)."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_td = (o_t < rows)[:, None] & (o_d < WIDTH)[None, :]
    o_td = o_t[:, None] * WIDTH + o_d[None, :]
    b_dy = tl.load(p_dy + o_td, mask=m_td, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + o_td, mask=m_td, other=0.0).to(tl.float32)
    b_z = tl.load(p_z + o_t[:, None] * stride_z + o_d[None, :], mask=m_td, other=0.0).to(tl.float32)
    b_open = tl.sigmoid(b_z)
    tl.store(p_y + o_td, (b_dy * b_z * b_open).to(p_y.dtype.element_ty), mask=m_td)
    b_dz = b_dy * b_y * b_open * (1.0 + b_z * (1.0 - b_open))
    tl.store(p_dz + o_td, b_dz.to(p_dz.dtype.element_ty), mask=m_td)


@triton.jit
def rebuilt(
    p_states,
    p_rows,
    p_outer,
    p_dt,
    p_bias,
    A,
    i_state,
    o_chunk,
    m_q,
    i_h,
    o_row,
    o_p,
    o_outer,
    o_n,
    stride_rows,
    stride_outer,
    stride_dt,
    dt_min,
    dt_max,
    IS_MIDDLE,
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The stored state of a span, carried over the rows of its other chunk where the middle is wanted: [P, N]."""
    m_pn = (o_p < P)[:, None] & (o_n < N)[None, :]
    b_state = tl.load(p_states + i_state * (P * N) + o_p[:, None] * N + o_n[None, :], mask=m_pn, other=0.0)
    EXACT: tl.constexpr = p_rows.dtype.element_ty == tl.float32
    if IS_MIDDLE:
        _, _, b_delta = time_step(p_dt, p_bias, o_chunk, m_q, i_h, stride_dt, dt_min, dt_max, HAS_BIAS, SOFTPLUS)
        b_high, b_low, high, low = running_sum(b_delta * A, EXACT)
        b_rows, b_outer = chunk_gain(
            p_rows,
            p_outer,
            o_chunk,
            m_q,
            b_delta,
            b_high,
            b_low,
            high,
            low,
            o_row,
            o_p,
            o_outer,
            o_n,
            stride_rows,
            stride_outer,
            P,
            N,
            REVERSE,
        )
        b_kept = b_state.to(tl.float32) * decay(high, low)
        b_state = tl.dot(tl.trans(b_rows), b_outer, b_kept, input_precision=PRECISION).to(p_states.dtype.element_ty)
    return b_state


@triton.heuristics(
    {
        "HAS_D": lambda args: args["p_D"] is not None,
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
    }
)
@triton.jit(do_not_specialize=["sequences", "steps", "dt_min", "dt_max"])
def inputs_kernel(
    p_dy,
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_cu_seqlens,
    p_D,
    p_bias,
    p_S,
    p_G,
    p_dx,
    p_ddt,
    p_parts,
    sequences,
    steps,
    dt_min,
    dt_max,
    stride_x,
    stride_dt,
    stride_B,
    stride_C,
    stride_dx,
    stride_ddt,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx and ddt of one chunk and head, and its parts of dA, dD and dbias: parts[chunk, 3, H]."""
    i_half = tl.program_id(0) % 2
    i_h = tl.program_id(0) // 2 % H
    i_span = tl.program_id(0) // (2 * H)
    _, _, o_span, o_end, _ = tile(p_cu_seqlens, sequences, i_span, steps, 2 * Q)
    o_q = tl.arange(0, Q)
    o_p = tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    i_g = i_h // (H // GROUPS)
    i_state = i_span.to(tl.int64) * H + i_h
    o_first = o_span + i_half * Q
    o_other = o_span + (1 - i_half) * Q
    m_other = o_q < o_end - o_other
    p_own = p_parts + (i_span.to(tl.int64) * 2 + i_half) * (3 * H) + i_h
    part_A, part_D, part_bias = 0.0, 0.0, 0.0
    DT: tl.constexpr = p_x.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DT

    if o_first < o_end:
        A = tl.load(p_A + i_h).to(tl.float32)
        b_S = rebuilt(
            p_S, p_x, p_B, p_dt, p_bias, A, i_state, o_other, m_other, i_h, i_h * P, o_p, i_g * N, o_n,
            stride_x, stride_B, stride_dt, dt_min, dt_max, i_half == 1,
            P, N, False, HAS_BIAS, SOFTPLUS, PRECISION,
        )  # fmt: skip
        b_G = rebuilt(
            p_G, p_dy, p_C, p_dt, p_bias, A, i_state, o_other, m_other, i_h, i_h * P, o_p, i_g * N, o_n,
            H * P, stride_C, stride_dt, dt_min, dt_max, i_half == 0,
            P, N, True, HAS_BIAS, SOFTPLUS, PRECISION,
        )  # fmt: skip
        m_q = o_q < o_end - o_first
        b_raw, b_step, b_delta = time_step(
            p_dt, p_bias, o_first, m_q, i_h, stride_dt, dt_min, dt_max, HAS_BIAS, SOFTPLUS
        )
        b_high, b_low, high, low = running_sum(b_delta * A, EXACT)
        b_B = load_rows(p_B, o_first, m_q, i_g * N, o_n, stride_B, N)
        b_C = load_rows(p_C, o_first, m_q, i_g * N, o_n, stride_C, N)
        b_x = load_rows(p_x, o_first, m_q, i_h * P, o_p, stride_x, P)
        b_dy = load_rows(p_dy, o_first, m_q, i_h * P, o_p, H * P, P)

        if HAS_D:
            D = tl.load(p_D + i_h).to(tl.float32)

        # iS_t = exp(cs_t) dy_t . (S0 C_t), and exp(cs_Q) <G, S0>
        b_read = tl.dot(b_C, tl.trans(b_S), input_precision=PRECISION) * decay(b_high, b_low)[:, None]  # [Q, P]
        b_before = tl.sum(b_dy.to(tl.float32) * b_read, 1)
        through = decay(high, low) * tl.sum(b_G.to(tl.float32) * b_S.to(tl.float32))

        b_m = decayed(tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION), 1.0, b_high, b_low)  # [Q (t), Q (s)]

        # v = (L * C B^T)^T dy + exp(cs_Q - cs) B G^T, and iG_s = Delta_s x_s . (its second term)
        b_v = tl.dot(b_B, tl.trans(b_G), input_precision=PRECISION) * decay(high - b_high, low - b_low)[:, None]
        b_after = b_delta * tl.sum(b_x.to(tl.float32) * b_v, 1)
        b_v = tl.dot(tl.trans(b_m.to(DT)), b_dy, b_v, input_precision=PRECISION)  # [Q, P]

        # R_us, and what crosses t: its sum over u > s' = t-1 and s <= s'
        b_dyx = tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION)  # [Q (u), Q (s)]
        m_later = o_q[:, None] > o_q[None, :]
        b_R = tl.where(m_later, b_m * b_delta[None, :] * b_dyx, 0.0)
        b_cross = tl.sum(tl.where(m_later, tl.cumsum(b_R, 1), 0.0), 0) + tl.cumsum(b_after, 0)
        m_previous = o_q[:, None] == o_q[None, :] + 1
        b_da = tl.sum(tl.where(m_previous, b_cross[None, :], 0.0), 1)  # [Q], that of t-1
        b_da += through + tl.cumsum(b_before, 0, reverse=True)

        b_ddelta = tl.sum(b_x.to(tl.float32) * b_v, 1) + A * b_da
        b_ddt = tl.where((b_step >= dt_min) & (b_step <= dt_max), b_ddelta, 0.0)
        if SOFTPLUS:
            b_ddt *= tl.sigmoid(b_raw)
        b_ddt = tl.where(m_q, b_ddt, 0.0)
        p_chunk = p_ddt + (o_first + o_q) * stride_ddt + i_h
        tl.store(p_chunk, b_ddt.to(p_ddt.dtype.element_ty), mask=m_q)
        part_A = tl.sum(b_delta * b_da)
        part_bias = tl.sum(b_ddt)

        b_dx = b_v * b_delta[:, None]
        if HAS_D:
            b_dx += D * b_dy.to(tl.float32)
            part_D = tl.sum(b_dy.to(tl.float32) * b_x.to(tl.float32))
        store_rows(p_dx, b_dx, o_first, m_q, i_h * P, o_p, stride_dx, P)

    tl.store(p_own, part_A)
    tl.store(p_own + H, part_D)
    tl.store(p_own + 2 * H, part_bias)


@triton.jit
def outer_gradient(
    p_dy,
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_bias,
    p_states,
    p_out,
    dt_min,
    dt_max,
    stride_x,
    stride_dt,
    stride_B,
    stride_C,
    stride_out,
    i_span,
    i_half,
    i_g,
    o_span,
    o_end,
    o_n,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OF_C: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns o_n of dC (OF_C) or of dB, summed over the group's heads in their order."""
    o_q = tl.arange(0, Q)
    o_p = tl.arange(0, BLOCK_P)
    o_chunk = o_span + i_half * Q
    m_q = o_q < o_end - o_chunk
    o_other = o_span + (1 - i_half) * Q
    m_other = o_q < o_end - o_other
    DT: tl.constexpr = p_x.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DT
    b_scores = tl.zeros([Q, Q], dtype=tl.float32)  # [t, s]: sum over heads of L_ts Delta_s (dy_t . x_s)
    b_out = tl.zeros([Q, o_n.shape[0]], dtype=tl.float32)
    for i_h in tl.range(i_g * (H // GROUPS), (i_g + 1) * (H // GROUPS), disable_licm=True):
        A = tl.load(p_A + i_h).to(tl.float32)
        i_state = i_span.to(tl.int64) * H + i_h
        _, _, b_delta = time_step(p_dt, p_bias, o_chunk, m_q, i_h, stride_dt, dt_min, dt_max, HAS_BIAS, SOFTPLUS)
        b_high, b_low, high, low = running_sum(b_delta * A, EXACT)
        b_x = load_rows(p_x, o_chunk, m_q, i_h * P, o_p, stride_x, P)
        b_dy = load_rows(p_dy, o_chunk, m_q, i_h * P, o_p, H * P, P)
        b_dyx = tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION)
        b_scores += decayed(b_dyx, b_delta[None, :], b_high, b_low)
        if OF_C:
            b_state = rebuilt(
                p_states, p_x, p_B, p_dt, p_bias, A, i_state, o_other, m_other, i_h, i_h * P, o_p,
                i_g * N, o_n, stride_x, stride_B, stride_dt, dt_min, dt_max, i_half == 1,
                P, N, False, HAS_BIAS, SOFTPLUS, PRECISION,
            )  # fmt: skip
            b_rows, b_weight = b_dy, decay(b_high, b_low)
        else:
            b_state = rebuilt(
                p_states, p_dy, p_C, p_dt, p_bias, A, i_state, o_other, m_other, i_h, i_h * P, o_p,
                i_g * N, o_n, H * P, stride_C, stride_dt, dt_min, dt_max, i_half == 0,
                P, N, True, HAS_BIAS, SOFTPLUS, PRECISION,
            )  # fmt: skip
            b_rows, b_weight = b_x, decay(high - b_high, low - b_low) * b_delta
        b_rows = (b_rows.to(tl.float32) * b_weight[:, None]).to(DT)
        b_out = tl.dot(b_rows, b_state, b_out, input_precision=PRECISION)
    if OF_C:
        b_B = load_rows(p_B, o_chunk, m_q, i_g * N, o_n, stride_B, N)
        b_out = tl.dot(b_scores.to(DT), b_B, b_out, input_precision=PRECISION)
    else:
        b_C = load_rows(p_C, o_chunk, m_q, i_g * N, o_n, stride_C, N)
        b_out = tl.dot(tl.trans(b_scores.to(DT)), b_C, b_out, input_precision=PRECISION)
    store_rows(p_out, b_out, o_chunk, m_q, i_g * N, o_n, stride_out, N)


@triton.heuristics({"HAS_BIAS": lambda args: args["p_bias"] is not None})
@triton.jit(do_not_specialize=["sequences", "steps", "dt_min", "dt_max"])
def outer_kernel(
    p_dy,
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_cu_seqlens,
    p_bias,
    p_S,
    p_G,
    p_dB,
    p_dC,
    sequences,
    steps,
    dt_min,
    dt_max,
    stride_x,
    stride_dt,
    stride_B,
    stride_C,
    stride_dB,
    stride_dC,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dB or dC of one chunk and group, BLOCK_N columns of it: programs that share rows are neighbours."""
    i = tl.program_id(0)
    i_role = i % 2
    i_half = i // 2 % 2
    i_n = i // 4 % tl.cdiv(N, BLOCK_N)
    i_g = i // (4 * tl.cdiv(N, BLOCK_N)) % GROUPS
    i_span = i // (4 * tl.cdiv(N, BLOCK_N) * GROUPS)
    _, _, o_span, o_end, _ = tile(p_cu_seqlens, sequences, i_span, steps, 2 * Q)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if o_span + i_half * Q < o_end:
        if i_role == 0:
            outer_gradient(
                p_dy, p_x, p_dt, p_A, p_B, p_C, p_bias, p_S, p_dC, dt_min, dt_max,
                stride_x, stride_dt, stride_B, stride_C, stride_dC, i_span, i_half, i_g, o_span, o_end, o_n,
                H, P, N, GROUPS, SOFTPLUS, HAS_BIAS, True, Q, BLOCK_P, PRECISION,
            )  # fmt: skip
        else:
            outer_gradient(
                p_dy, p_x, p_dt, p_A, p_B, p_C, p_bias, p_G, p_dB, dt_min, dt_max,
                stride_x, stride_dt, stride_B, stride_C, stride_dB, i_span, i_half, i_g, o_span, o_end, o_n,
                H, P, N, GROUPS, SOFTPLUS, HAS_BIAS, False, Q, BLOCK_P, PRECISION,
            )  # fmt: skip
