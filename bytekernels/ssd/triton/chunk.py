"""Device functions that the scan's kernels share: time steps, decays inside a chunk, the place of a tile."""

import triton
import triton.language as tl

from bytekernels.launch import sequence_of_tile

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH = tl.constexpr(0.693359375)  # ten bits, so that its multiples below are exact
LN_2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def softplus(b_x):
    """log(1 + exp(v)) = max(v, 0) + log1p(u), u = exp(-|v|), to 1e-6 of its value wherever float32 has it; NaN stays.

    exp is taken of what is left of -|v| after multiples of log 2, as its hardware loses digits where |v| is large.
    log1p(u) = 2 artanh(s) with s = u / (2 + u) <= 1/3, by its series.
    """
    b_size = tl.abs(b_x)
    b_size = tl.where(b_size > 128.0, 128.0, b_size)
    b_twos = tl.floor(b_size * LOG2_E + 0.5)
    b_u = tl.exp2(-b_twos) * tl.exp(b_twos * LN_2_LOW + (b_twos * LN_2_HIGH - b_size))
    b_s = b_u / (2.0 + b_u)
    b_square = b_s * b_s
    b_series = b_square / 13
    for i in tl.static_range(5):
        b_series = b_square * (b_series + 1.0 / (11 - 2 * i))
    return tl.where(b_x > 0.0, b_x, 0.0) + 2.0 * b_s * (1.0 + b_series)


@triton.jit
def clamp(b_x, low, high):
    b_x = tl.maximum(b_x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(b_x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def silu(b_x):
    return b_x * tl.sigmoid(b_x)


@triton.jit
def time_step(
    p_dt, p_bias, o_chunk, m_q, i_h, stride_dt, dt_min, dt_max, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr
):
    """dt + bias, its softplus, and Delta = clamp(softplus(dt + bias)); Delta is 0 where there is no row: [Q] each."""
    o_t = o_chunk + tl.arange(0, m_q.shape[0]).to(tl.int64)
    b_raw = tl.load(p_dt + o_t * stride_dt + i_h, mask=m_q, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_raw += tl.load(p_bias + i_h).to(tl.float32)
    b_step = b_raw
    if SOFTPLUS:
        b_step = softplus(b_raw)
    b_delta = tl.where(m_q, clamp(b_step, dt_min, dt_max), 0.0)
    # The sum over one value keeps the compiler from computing all this again in every layout that needs Delta.
    return b_raw, b_step, tl.sum(b_delta[:, None], 1)


@triton.jit
def running_sum(b_log_decay, EXACT: tl.constexpr):
    """cs_t = sum of log decays to t, and the last.

    EXACT, in two floats each: a float's rounding where cs is large would show in a small difference.
    """
    o_q = tl.arange(0, b_log_decay.shape[0])
    if EXACT:
        b_cs = tl.cumsum(b_log_decay.to(tl.float64), 0)
        total = tl.sum(tl.where(o_q == b_log_decay.shape[0] - 1, b_cs, 0.0), 0)
        b_high, high = b_cs.to(tl.float32), total.to(tl.float32)
        b_low, low = (b_cs - b_high.to(tl.float64)).to(tl.float32), (total - high.to(tl.float64)).to(tl.float32)
    else:
        b_high = tl.cumsum(b_log_decay, 0)
        high = tl.sum(tl.where(o_q == b_log_decay.shape[0] - 1, b_high, 0.0), 0)
        b_low, low = tl.zeros_like(b_high), tl.zeros_like(high)
    return b_high, b_low, high, low


@triton.jit
def decay(high, low):
    """exp of a difference of running sums, which is at most 0."""
    return tl.exp(tl.minimum(high + low, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def decayed(b_scores, weight, b_high, b_low):
    """scores[t, s] exp(cs_t - cs_s) weight[s] for t >= s, 0 elsewhere: [Q, Q].

    The zero that bounds the exponent is taken from the scores, so that the compiler lays the decays out as it has laid
    out the scores and need not move a matrix.
    """
    o_q = tl.arange(0, b_high.shape[0])
    b_difference = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    b_zero = tl.minimum(tl.abs(b_scores), 0.0)
    b_decay = tl.exp(tl.minimum(b_difference, b_zero, propagate_nan=tl.PropagateNan.ALL))
    return tl.where(o_q[:, None] >= o_q[None, :], b_scores * b_decay * weight, 0.0)


@triton.jit
def load_rows(p_rows, o_chunk, m_q, o_first, o_d, stride, D: tl.constexpr):
    """Columns [o_first, o_first + D) of the rows from o_chunk on: [Q, BLOCK_D], 0 where there is none."""
    o_t = o_chunk + tl.arange(0, m_q.shape[0]).to(tl.int64)
    p_chunk = p_rows + o_t[:, None] * stride + o_first + o_d[None, :]
    return tl.load(p_chunk, mask=m_q[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(p_rows, b_rows, o_chunk, m_q, o_first, o_d, stride, D: tl.constexpr):
    """Write the columns that :func:`load_rows` reads."""
    o_t = o_chunk + tl.arange(0, m_q.shape[0]).to(tl.int64)
    p_chunk = p_rows + o_t[:, None] * stride + o_first + o_d[None, :]
    tl.store(p_chunk, b_rows.to(p_rows.dtype.element_ty), mask=m_q[:, None] & (o_d < D)[None, :])


@triton.jit
def tile(p_cu_seqlens, sequences, i_tile, steps, LENGTH: tl.constexpr):
    """Where tile i_tile of LENGTH rows lies: (sequence, its number there, first row, end, the sequence's end)."""
    i_s = sequence_of_tile(p_cu_seqlens, sequences, i_tile, steps, LENGTH)
    o_start = tl.load(p_cu_seqlens + i_s).to(tl.int64)
    o_stop = tl.load(p_cu_seqlens + i_s + 1).to(tl.int64)
    i_own = i_tile - o_start // LENGTH - i_s
    o_first = o_start + i_own * LENGTH
    return i_s.to(tl.int64), i_own, o_first, tl.minimum(o_first + LENGTH, o_stop), o_stop
