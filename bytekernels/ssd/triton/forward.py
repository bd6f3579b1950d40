"""The scan forward: one program walks the chunks of a segment of a sequence for one head, its state in registers.

A chunk has Q bytes and begins at a multiple of Q from its sequence's start; with S0 the state before it,
``y_t = sum_{s<=t} exp(cs_t - cs_s) (C_t . B_s) Delta_s x_s + exp(cs_t) S0 C_t`` and
``S = exp(cs_Q) S0 + sum_s exp(cs_Q - cs_s) Delta_s x_s (x) B_s`` (Dao & Gu 2024, arXiv 2405.21060, section 6).
"""

import triton
import triton.language as tl

from bytekernels.ssd.triton.chunk import decay, decayed, load_rows, running_sum, silu, store_rows, tile, time_step


@triton.heuristics(
    {
        "HAS_D": lambda args: args["p_D"] is not None,
        "HAS_Z": lambda args: args["p_z"] is not None,
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
        "HAS_INITIAL": lambda args: args["p_initial"] is not None,
        "HAS_CARRY": lambda args: args["p_carry"] is not None,
    }
)
@triton.jit(do_not_specialize=["sequences", "steps", "dt_min", "dt_max"])
def scan_kernel(
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_cu_seqlens,
    p_D,
    p_z,
    p_bias,
    p_initial,
    p_carry,
    p_y,
    p_final,
    sequences,
    steps,
    dt_min,
    dt_max,
    stride_x,
    stride_dt,
    stride_B,
    stride_C,
    stride_z,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    SEGMENT: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y and the final states of one segment and head."""
    i_h = tl.program_id(0) % H
    i_segment = tl.program_id(0) // H
    i_s, i_own, o_first, o_end, o_stop = tile(p_cu_seqlens, sequences, i_segment, steps, SEGMENT)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    o_q = tl.arange(0, Q)
    o_pn = o_p[:, None] * N + o_n[None, :]
    m_pn = (o_p < P)[:, None] & (o_n < N)[None, :]
    i_g = i_h // (H // GROUPS)
    A = tl.load(p_A + i_h).to(tl.float32)
    if HAS_D:
        D = tl.load(p_D + i_h).to(tl.float32)
    DT: tl.constexpr = p_x.dtype.element_ty
    EXACT: tl.constexpr = tl.float32 == DT

    if (o_first < o_end) | (i_own == 0):
        b_S = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
        if HAS_INITIAL:
            p_state = p_initial + (i_s * H + i_h) * (P * N)
            b_S = tl.load(p_state + o_pn, mask=m_pn & (i_own == 0), other=0.0).to(tl.float32)
        if HAS_CARRY:
            p_state = p_carry + (i_segment.to(tl.int64) * H + i_h) * (P * N)
            b_S += tl.load(p_state + o_pn, mask=m_pn & (i_own > 0), other=0.0)

        for o_chunk in tl.range(o_first, o_end, Q, disable_licm=True):
            m_q = o_q < o_end - o_chunk
            b_B = load_rows(p_B, o_chunk, m_q, i_g * N, o_n, stride_B, N)
            b_C = load_rows(p_C, o_chunk, m_q, i_g * N, o_n, stride_C, N)
            b_x = load_rows(p_x, o_chunk, m_q, i_h * P, o_p, stride_x, P)
            _, _, b_delta = time_step(p_dt, p_bias, o_chunk, m_q, i_h, stride_dt, dt_min, dt_max, HAS_BIAS, SOFTPLUS)
            b_high, b_low, high, low = running_sum(b_delta * A, EXACT)

            # y = exp(cs) C S0^T + (L * C B^T * Delta + D I) x: [Q, P], its first half
            b_y = tl.dot(b_C, tl.trans(b_S.to(DT)), input_precision=PRECISION) * decay(b_high, b_low)[:, None]
            # S = exp(cs_Q) S0 + (exp(cs_Q - cs) Delta x)^T B: [P, N]
            b_inflow = (b_x.to(tl.float32) * (decay(high - b_high, low - b_low) * b_delta)[:, None]).to(DT)
            b_S = tl.dot(tl.trans(b_inflow), b_B, b_S * decay(high, low), input_precision=PRECISION)

            b_cb = tl.dot(b_C, tl.trans(b_B), input_precision=PRECISION)  # [Q, Q]
            b_cb = decayed(b_cb, b_delta[None, :], b_high, b_low)
            if HAS_D:
                b_cb += tl.where(o_q[:, None] == o_q[None, :], D, 0.0)
            b_y = tl.dot(b_cb.to(DT), b_x, b_y, input_precision=PRECISION)

            if HAS_Z:
                b_y *= silu(load_rows(p_z, o_chunk, m_q, i_h * P, o_p, stride_z, P).to(tl.float32))
            store_rows(p_y, b_y, o_chunk, m_q, i_h * P, o_p, H * P, P)

        if o_end == o_stop:
            tl.store(p_final + (i_s * H + i_h) * (P * N) + o_pn, b_S, mask=m_pn)
