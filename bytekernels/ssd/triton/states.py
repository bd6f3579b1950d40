"""States alone: start states (forward in time) or their gradients (backward), without y.

Forward, ``S <- exp(cs_Q) S + sum_s exp(cs_Q - cs_s) Delta_s x_s (x) B_s``; backward in time, with G = dL/dS,
``G <- exp(cs_Q) G + sum_t exp(cs_t) dy_t (x) C_t``. One kernel walks either way. A first walk from zero gives what each
segment of a long sequence adds, a second kernel carries that from segment to segment, and then all segments go at once.
"""

import triton
import triton.language as tl

from bytekernels.ssd.triton.chunk import decay, load_rows, running_sum, tile, time_step


@triton.jit
def chunk_gain(
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
    P: tl.constexpr,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """A chunk's rows, weighted, and what they are multiplied with: [Q, P] of x or dy, [Q, N] of B or C."""
    b_rows = load_rows(p_rows, o_chunk, m_q, o_row, o_p, stride_rows, P)
    b_weight = decay(b_high, b_low) if REVERSE else decay(high - b_high, low - b_low) * b_delta
    b_outer = load_rows(p_outer, o_chunk, m_q, o_outer, o_n, stride_outer, N)
    return (b_rows.to(tl.float32) * b_weight[:, None]).to(p_rows.dtype.element_ty), b_outer


@triton.heuristics(
    {
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
        "HAS_START": lambda args: args["p_start"] is not None,
        "HAS_CARRY": lambda args: args["p_carry"] is not None,
        "HAS_SPANS": lambda args: args["p_spans"] is not None,
        "HAS_END": lambda args: args["p_end"] is not None,
        "GAINS": lambda args: args["p_gain"] is not None,
    }
)
@triton.jit(do_not_specialize=["sequences", "steps", "dt_min", "dt_max"])
def walk_kernel(
    p_rows,
    p_outer,
    p_dt,
    p_A,
    p_bias,
    p_cu_seqlens,
    p_start,
    p_carry,
    p_spans,
    p_end,
    p_gain,
    p_keep,
    sequences,
    steps,
    dt_min,
    dt_max,
    stride_rows,
    stride_outer,
    stride_dt,
    H: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_END: tl.constexpr,
    GAINS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SPAN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk one segment for one head, from p_start, p_carry or zero.

    Stores the state that each span of SPAN rows is entered with (p_spans), that after the sequence (p_end), or from
    zero (GAINS) what the segment adds and the log of what it keeps.
    """
    i_h = tl.program_id(0) % H
    i_segment = tl.program_id(0) // H
    i_s, i_own, o_first, o_end, o_stop = tile(p_cu_seqlens, sequences, i_segment, steps, SEGMENT)
    o_start = o_first - i_own * SEGMENT
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = tl.arange(0, BLOCK_N)
    o_pn = o_p[:, None] * N + o_n[None, :]
    m_pn = (o_p < P)[:, None] & (o_n < N)[None, :]
    i_g = i_h // (H // GROUPS)
    A = tl.load(p_A + i_h).to(tl.float32)
    EXACT: tl.constexpr = p_rows.dtype.element_ty == tl.float32
    m_enters = o_end == o_stop if REVERSE else i_own == 0
    m_leaves = i_own == 0 if REVERSE else o_end == o_stop
    m_walks = (o_first < o_end) | (i_own == 0)
    if GAINS:
        m_walks = (o_first < o_end) & (not m_leaves)

    if m_walks:
        b_state = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
        if HAS_START:
            p_state = p_start + (i_s * H + i_h) * (P * N)
            b_state = tl.load(p_state + o_pn, mask=m_pn & m_enters, other=0.0).to(tl.float32)
        if HAS_CARRY:
            p_state = p_carry + (i_segment.to(tl.int64) * H + i_h) * (P * N)
            b_state += tl.load(p_state + o_pn, mask=m_pn & (not m_enters), other=0.0)
        log_keep = tl.full([], 0.0, dtype=tl.float64)

        i_first_span = o_start // SPAN + i_s
        for i_step in tl.range(0, tl.cdiv(o_end - o_first, Q), disable_licm=True):
            i_chunk = tl.cdiv(o_end - o_first, Q) - 1 - i_step if REVERSE else i_step
            o_chunk = o_first + i_chunk * Q
            m_q = tl.arange(0, Q) < o_end - o_chunk
            if HAS_SPANS:
                o_own = o_chunk - o_start  # from the sequence's start
                m_entry = o_own % SPAN == 0
                if REVERSE:
                    m_entry = (o_own % SPAN == SPAN - Q) | (o_chunk + Q >= o_end)
                p_span = p_spans + ((i_first_span + o_own // SPAN) * H + i_h) * (P * N)
                tl.store(p_span + o_pn, b_state.to(p_spans.dtype.element_ty), mask=m_pn & m_entry)
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
                i_h * P,
                o_p,
                i_g * N,
                o_n,
                stride_rows,
                stride_outer,
                P,
                N,
                REVERSE,
            )
            b_state = tl.dot(tl.trans(b_rows), b_outer, b_state * decay(high, low), input_precision=PRECISION)
            if GAINS:
                log_keep += high.to(tl.float64) + low.to(tl.float64)

        if HAS_END:
            tl.store(p_end + (i_s * H + i_h) * (P * N) + o_pn, b_state, mask=m_pn & m_leaves)
        if GAINS:
            i_place = i_segment.to(tl.int64) * H + i_h
            tl.store(p_gain + i_place * (P * N) + o_pn, b_state, mask=m_pn)
            if tl.program_id(1) == 0:
                tl.store(p_keep + i_place, tl.exp(log_keep.to(tl.float32)))


@triton.heuristics({"HAS_START": lambda args: args["p_start"] is not None})
@triton.jit
def carry_kernel(
    p_cu_seqlens,
    p_start,
    p_gain,
    p_keep,
    H: tl.constexpr,
    PN: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_START: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace each segment's gain by the state that it is entered with, along one sequence and head."""
    i_h = tl.program_id(0) % H
    i_s = (tl.program_id(0) // H).to(tl.int64)
    o_start = tl.load(p_cu_seqlens + i_s).to(tl.int64)
    o_stop = tl.load(p_cu_seqlens + i_s + 1).to(tl.int64)
    segments = tl.cdiv(o_stop - o_start, SEGMENT)
    o_e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < PN
    if segments > 1:
        b_state = tl.zeros([BLOCK], dtype=tl.float32)
        if HAS_START:
            b_state = tl.load(p_start + (i_s * H + i_h) * PN + o_e, mask=m_e, other=0.0).to(tl.float32)
        for i_step in range(0, segments):
            i_own = segments - 1 - i_step if REVERSE else i_step
            i_place = (o_start // SEGMENT + i_s + i_own) * H + i_h
            m_last = i_step == segments - 1  # nothing is entered after it
            b_gain = tl.load(p_gain + i_place * PN + o_e, mask=m_e & (not m_last), other=0.0)
            keep = tl.load(p_keep + i_place, mask=not m_last, other=0.0)
            tl.store(p_gain + i_place * PN + o_e, b_state, mask=m_e)
            b_state = keep * b_state + b_gain
