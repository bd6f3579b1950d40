"""The causal convolution in Triton.

A program owns some channels of a range of rows and walks over the rows with the last K-1 of them in registers. Where a
sequence starts it takes these from the initial state instead, so that no tap leaves its sequence and a row's bits
depend on its own sequence alone. Rows are loaded ``STEP`` at a time, before anything is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytekernels.byte_table.triton import byte_table_backward
from bytekernels.launch import first_at_or_after, on_device, search_steps, sum_parts, with_dense_rows

ROWS = 64  # that a program of the forward pass owns
STEP = 8  # rows that are loaded together
NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def _appended(values, value):
    values += (value,)
    return values


@triton.jit
def _sequence(p_cu, o_t, entries, steps):
    """The sequence of row t, its first row and the first row after it. Row T is in sequence S, which has no end."""
    i_s = (first_at_or_after(p_cu, entries, o_t + 1, steps) - 1).to(tl.int64)
    o_start = tl.load(p_cu + i_s).to(tl.int64)
    o_end = tl.load(p_cu + i_s + 1, mask=i_s + 1 < entries, other=NO_ROW).to(tl.int64)
    return i_s, o_start, o_end


@triton.jit
def _load(p_x, p_ids, o_t, m_t, o_c, m_c, stride_x, HAS_IDS: tl.constexpr):
    """x[t], or x[ids[t]]: [BLOCK_C]."""
    o_row = o_t
    if HAS_IDS:
        o_row = tl.load(p_ids + o_t, mask=m_t, other=0).to(tl.int64)
    return tl.load(p_x + o_row * stride_x + o_c, mask=m_t & m_c, other=0.0)


@triton.jit
def _load_rows(p_x, p_ids, o_t, rows, o_c, m_c, stride_x, HAS_IDS: tl.constexpr, STEP: tl.constexpr):
    """x[t], ..., x[t+STEP-1]."""
    b_rows = ()
    for i in tl.static_range(STEP):
        b_rows = _appended(b_rows, _load(p_x, p_ids, o_t + i, o_t + i < rows, o_c, m_c, stride_x, HAS_IDS))
    return b_rows


@triton.jit
def _before(
    p_x,
    p_ids,
    p_initial,
    o_t,
    i_s,
    o_start,
    m_t,
    o_c,
    m_c,
    stride_x,
    C: tl.constexpr,
    K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    """Rows t-1, ..., t-K+1 of sequence s in float32; those before its first are its initial state's, or zero."""
    b_before = ()
    for j in tl.static_range(1, K):
        m_own = m_t & (o_t - j >= o_start)
        b_x = _load(p_x, p_ids, o_t - j, m_own, o_c, m_c, stride_x, HAS_IDS)
        if HAS_INITIAL:
            o_state = (i_s * C + o_c) * (K - 1) + (K - 1 - j) + (o_t - o_start)
            b_state = tl.load(p_initial + o_state, mask=m_t & (o_t - j < o_start) & m_c, other=0.0)
            b_x = tl.where(m_own, b_x, b_state.to(b_x.dtype))
        b_before = _appended(b_before, b_x.to(tl.float32))
    return b_before


@triton.jit
def _parameters(p_weight, p_bias, o_c, m_c, K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The weights of taps 0 to K-1 rows back, and the bias, in float32."""
    b_w = ()
    for j in tl.static_range(K):
        b_w = _appended(b_w, tl.load(p_weight + o_c * K + (K - 1 - j), mask=m_c, other=0.0).to(tl.float32))
    b_bias = tl.zeros([BLOCK_C], dtype=tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return b_w, b_bias


@triton.jit
def _sum_of_taps(b_x, b_before, b_w, b_bias, K: tl.constexpr):
    """bias + sum_j w_j x_{t-j}, the newest first."""
    b_sum = tl.fma(b_w[0], b_x, b_bias)
    for j in tl.static_range(1, K):
        b_sum = tl.fma(b_w[j], b_before[j - 1], b_sum)
    return b_sum


@triton.jit
def _pushed(b_x, b_before, K: tl.constexpr):
    """The newest first, without the oldest."""
    b_next = (b_x,)
    for j in tl.static_range(K - 2):
        b_next = _appended(b_next, b_before[j])
    return b_next


@triton.jit
def _zeros(N: tl.constexpr, BLOCK_C: tl.constexpr):
    b_zeros = ()
    for _ in tl.static_range(N):
        b_zeros = _appended(b_zeros, tl.zeros([BLOCK_C], dtype=tl.float32))
    return b_zeros


@triton.jit
def _sigmoid(b_x):
    return 1.0 / (1.0 + tl.exp(-b_x))


@triton.jit
def _forward_row(b_x, b_before, b_w, b_bias, K: tl.constexpr, SILU: tl.constexpr):
    """y_t = act(sum_t), and the rows before the next."""
    b_x = b_x.to(tl.float32)
    b_y = _sum_of_taps(b_x, b_before, b_w, b_bias, K)
    if SILU:
        b_y *= _sigmoid(b_y)
    return b_y, _pushed(b_x, b_before, K)


@triton.jit
def _gradient(b_x, b_dy, b_before, b_w, b_bias, K: tl.constexpr, SILU: tl.constexpr):
    """g_t = dy_t act'(sum_t)."""
    b_g = b_dy.to(tl.float32)
    if SILU:
        b_sum = _sum_of_taps(b_x, b_before, b_w, b_bias, K)
        b_sigmoid = _sigmoid(b_sum)
        b_g *= b_sigmoid * (1.0 + b_sum * (1.0 - b_sigmoid))
    return b_g


@triton.jit
def _backward_row(b_x, b_dy, b_before, b_pending, b_parts, b_w, b_bias, m_own, K: tl.constexpr, SILU: tl.constexpr):
    """dx_{t-K+1}, and what the next row takes: rows before it, pending rows of dx and sums of dw and dbias.

    Products are fused with sums by name: left to the compiler, that would differ between the unrolled steps and the
    loop row by row, and a row's bits would depend on its place in the tile.
    """
    b_x = b_x.to(tl.float32)
    b_g = _gradient(b_x, b_dy, b_before, b_w, b_bias, K, SILU)
    b_own = tl.where(m_own, b_g, 0.0)
    b_sums = (b_parts[0] + b_own * b_x,)
    for j in tl.static_range(1, K):
        b_sums = _appended(b_sums, b_parts[j] + b_own * b_before[j - 1])
    b_sums = _appended(b_sums, b_parts[K] + b_own)
    b_next = (b_w[0] * b_g,)
    for j in tl.static_range(1, K - 1):
        b_next = _appended(b_next, tl.fma(b_w[j], b_g, b_pending[j - 1]))
    b_dx = tl.fma(b_w[K - 1], b_g, b_pending[K - 2])
    return b_dx, _pushed(b_x, b_before, K), b_next, b_sums


@triton.heuristics(
    {
        "HAS_IDS": lambda args: args["p_ids"] is not None,
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
        "HAS_INITIAL": lambda args: args["p_initial"] is not None,
    }
)
@triton.jit(do_not_specialize=["rows", "row_tiles", "entries", "steps"])
def forward_kernel(
    p_x,
    p_ids,
    p_weight,
    p_bias,
    p_cu,
    p_initial,
    p_y,
    p_final,
    rows,
    row_tiles,
    entries,
    steps,
    stride_x,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y_t = act(bias + sum_j w_j x_{t-j}); after the tiles of rows, the last K-1 rows of each sequence."""
    i_tile = tl.program_id(0).to(tl.int64) // tl.cdiv(C, BLOCK_C)
    o_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    if i_tile < row_tiles:
        b_w, b_bias = _parameters(p_weight, p_bias, o_c, m_c, K, HAS_BIAS, BLOCK_C)
        o_first = i_tile * ROWS
        i_s, o_start, o_end = _sequence(p_cu, o_first, entries, steps)
        b_before = _before(
            p_x, p_ids, p_initial, o_first, i_s, o_start, True, o_c, m_c, stride_x, C, K, HAS_IDS, HAS_INITIAL
        )
        for i_step in range(0, ROWS, STEP):
            o_step = o_first + i_step
            if o_step + STEP <= tl.minimum(o_end, rows):  # all of one sequence
                b_rows = _load_rows(p_x, p_ids, o_step, rows, o_c, m_c, stride_x, HAS_IDS, STEP)
                for i in tl.static_range(STEP):
                    b_y, b_before = _forward_row(b_rows[i], b_before, b_w, b_bias, K, SILU)
                    tl.store(p_y + (o_step + i) * C + o_c, b_y, mask=m_c)
            else:
                for i in range(tl.minimum(rows - o_step, STEP)):
                    o_t = o_step + i
                    if o_t == o_end:
                        i_s, o_start, o_end = _sequence(p_cu, o_t, entries, steps)
                        b_before = _before(
                            p_x,
                            p_ids,
                            p_initial,
                            o_t,
                            i_s,
                            o_start,
                            True,
                            o_c,
                            m_c,
                            stride_x,
                            C,
                            K,
                            HAS_IDS,
                            HAS_INITIAL,
                        )
                    b_x = _load(p_x, p_ids, o_t, True, o_c, m_c, stride_x, HAS_IDS)
                    b_y, b_before = _forward_row(b_x, b_before, b_w, b_bias, K, SILU)
                    tl.store(p_y + o_t * C + o_c, b_y, mask=m_c)
    else:
        i_s = i_tile - row_tiles
        o_start = tl.load(p_cu + i_s).to(tl.int64)
        o_end = tl.load(p_cu + i_s + 1).to(tl.int64)
        b_last = _before(
            p_x, p_ids, p_initial, o_end, i_s, o_start, True, o_c, m_c, stride_x, C, K, HAS_IDS, HAS_INITIAL
        )
        for j in tl.static_range(K - 1):
            tl.store(p_final + (i_s * C + o_c) * (K - 1) + (K - 2 - j), b_last[j], mask=m_c)


@triton.heuristics(
    {
        "HAS_IDS": lambda args: args["p_ids"] is not None,
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
        "HAS_INITIAL": lambda args: args["p_initial"] is not None,
        "HAS_DFINAL": lambda args: args["p_dfinal"] is not None,
    }
)
@triton.jit(do_not_specialize=["rows", "row_tiles", "tile_rows", "entries", "steps"])
def backward_kernel(
    p_dy,
    p_dfinal,
    p_x,
    p_ids,
    p_weight,
    p_bias,
    p_cu,
    p_initial,
    p_dx,
    p_parts,
    p_dinitial,
    rows,
    row_tiles,
    tile_rows,
    entries,
    steps,
    stride_dy,
    stride_x,
    stride_dx,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """With g_t = dy_t act'(sum_t): dx_t = sum_j w_j g_{t+j}, and this tile's parts of dw_j = sum_t g_t x_{t-j} and
    dbias = sum_t g_t; after the tiles of rows, the initial state of each sequence as rows before its first. A final
    state's gradient is added to the rows that it is made of."""
    i_tile = tl.program_id(0).to(tl.int64) // tl.cdiv(C, BLOCK_C)
    o_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_w, b_bias = _parameters(p_weight, p_bias, o_c, m_c, K, HAS_BIAS, BLOCK_C)
    if i_tile < row_tiles:
        o_first = i_tile * tile_rows
        o_last = tl.minimum(o_first + tile_rows, rows)
        i_s, o_start, o_end = _sequence(p_cu, o_first, entries, steps)
        b_before = _before(
            p_x, p_ids, p_initial, o_first, i_s, o_start, True, o_c, m_c, stride_x, C, K, HAS_IDS, HAS_INITIAL
        )
        o_start = tl.maximum(o_start, o_first)  # of the rows whose dx is to be written
        b_pending = _zeros(K - 1, BLOCK_C)  # what rows t-1, ..., t-K+1 have of dx
        b_parts = _zeros(K + 1, BLOCK_C)
        for i_step in range(0, o_last - o_first + K - 1, STEP):
            o_step = o_first + i_step
            if o_step + STEP <= tl.minimum(o_end, o_last):  # all of one sequence, all this tile's
                b_rows = _load_rows(p_x, p_ids, o_step, rows, o_c, m_c, stride_x, HAS_IDS, STEP)
                b_dys = _load_rows(p_dy, None, o_step, rows, o_c, m_c, stride_dy, False, STEP)
                for i in tl.static_range(STEP):
                    b_dx, b_before, b_pending, b_parts = _backward_row(
                        b_rows[i], b_dys[i], b_before, b_pending, b_parts, b_w, b_bias, True, K, SILU
                    )
                    o_row = o_step + i - (K - 1)
                    tl.store(p_dx + o_row * stride_dx + o_c, b_dx, mask=m_c & (o_row >= o_start))
            else:
                for i in range(STEP):
                    o_t = o_step + i
                    m_t = o_t < rows
                    if o_t == o_end:
                        for j in tl.static_range(1, K):  # the last rows of the sequence that ends here
                            o_row = o_t - j
                            m_row = m_c & (o_row >= o_start) & (o_row < o_last)
                            b_dx = b_pending[j - 1]
                            if HAS_DFINAL:
                                o_state = (i_s * C + o_c) * (K - 1) + (K - 1 - j)
                                b_dx += tl.load(p_dfinal + o_state, mask=m_row, other=0.0).to(tl.float32)
                            tl.store(p_dx + o_row * stride_dx + o_c, b_dx, mask=m_row)
                        i_s, o_start, o_end = _sequence(p_cu, o_t, entries, steps)
                        b_before = _before(
                            p_x,
                            p_ids,
                            p_initial,
                            o_t,
                            i_s,
                            o_start,
                            m_t,
                            o_c,
                            m_c,
                            stride_x,
                            C,
                            K,
                            HAS_IDS,
                            HAS_INITIAL,
                        )
                    b_x = _load(p_x, p_ids, o_t, m_t, o_c, m_c, stride_x, HAS_IDS)
                    b_dy = _load(p_dy, None, o_t, m_t, o_c, m_c, stride_dy, False)
                    b_dx, b_before, b_pending, b_parts = _backward_row(
                        b_x, b_dy, b_before, b_pending, b_parts, b_w, b_bias, o_t < o_last, K, SILU
                    )
                    o_row = o_t - (K - 1)
                    m_row = m_c & (o_row >= o_start) & (o_row < o_last)
                    tl.store(p_dx + o_row * stride_dx + o_c, b_dx, mask=m_row)
        p_parts += i_tile * (K + 1) * C
        for j in tl.static_range(K + 1):
            tl.store(p_parts + j * C + o_c, b_parts[j], mask=m_c)
    elif HAS_INITIAL:
        i_s = i_tile - row_tiles
        o_start = tl.load(p_cu + i_s).to(tl.int64)
        o_end = tl.load(p_cu + i_s + 1).to(tl.int64)
        b_before = _before(
            p_x, p_ids, p_initial, o_start, i_s, o_start, True, o_c, m_c, stride_x, C, K, HAS_IDS, HAS_INITIAL
        )
        b_sums = _zeros(K - 1, BLOCK_C)  # of the rows K-1, ..., 1 before the first, oldest last
        for i in tl.static_range(K - 1):
            m_t = o_start + i < o_end
            b_x = _load(p_x, p_ids, o_start + i, m_t, o_c, m_c, stride_x, HAS_IDS).to(tl.float32)
            b_dy = _load(p_dy, None, o_start + i, m_t, o_c, m_c, stride_dy, False)
            b_g = _gradient(b_x, b_dy, b_before, b_w, b_bias, K, SILU)
            b_before = _pushed(b_x, b_before, K)
            b_next = ()
            for j in tl.static_range(K - 1):  # row j+1 before the first is i+j+1 back from row i
                b_next = _appended(b_next, b_sums[j] + b_w[i + j + 1] * b_g if i + j + 1 < K else b_sums[j])
            b_sums = b_next
        for j in tl.static_range(K - 1):
            b_d = b_sums[j]
            o_state = (i_s * C + o_c) * (K - 1)
            o_final = K - 2 - j - (o_end - o_start)  # where the final state has this row
            if HAS_DFINAL:
                b_d += tl.load(p_dfinal + o_state + o_final, mask=m_c & (o_final >= 0), other=0.0).to(tl.float32)
            tl.store(p_dinitial + o_state + (K - 2 - j), b_d, mask=m_c)


@triton.heuristics({"HAS_BIAS": lambda args: args["p_bias"] is not None})
@triton.jit
def step_kernel(
    p_x,
    p_state,
    p_weight,
    p_bias,
    p_y,
    stride_x,
    stride_s,
    stride_c,
    stride_k,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = act(bias + w_0 x + sum_j w_j state_{K-1-j}), and the state moved on by x."""
    i_s = tl.program_id(0).to(tl.int64) // tl.cdiv(C, BLOCK_C)
    o_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_w, b_bias = _parameters(p_weight, p_bias, o_c, m_c, K, HAS_BIAS, BLOCK_C)
    p_state += i_s * stride_s + o_c * stride_c
    b_x = tl.load(p_x + i_s * stride_x + o_c, mask=m_c, other=0.0).to(p_state.dtype.element_ty)
    b_before = ()
    for j in tl.static_range(1, K):
        b_before = _appended(b_before, tl.load(p_state + (K - 1 - j) * stride_k, mask=m_c, other=0.0).to(tl.float32))
    b_y, b_before = _forward_row(b_x, b_before, b_w, b_bias, K, SILU)
    tl.store(p_y + i_s * C + o_c, b_y, mask=m_c)
    for j in tl.static_range(K - 1):
        tl.store(p_state + (K - 2 - j) * stride_k, b_before[j], mask=m_c)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    silu: bool,
    initial_states: Tensor | None,
    *,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As in reference.py. With ids uint8 [T], x is a table [256, C] and row t of the input its row ids[t]."""
    x, cu_seqlens = with_dense_rows(x), cu_seqlens.contiguous()
    rows, sequences = len(x if ids is None else ids), len(cu_seqlens) - 1
    channels, width = weight.shape
    y, final_states = x.new_empty(rows, channels), x.new_empty(sequences, channels, width - 1)
    row_tiles = triton.cdiv(rows, ROWS)
    across, options = _across(channels, 144 if initial_states is None and ids is None else 168)
    with on_device(x):
        if across * (row_tiles + sequences):
            forward_kernel[(across * (row_tiles + sequences),)](
                x,
                _contiguous(ids),
                weight.contiguous(),
                _contiguous(bias),
                cu_seqlens,
                _contiguous(initial_states),
                y,
                final_states,
                rows,
                row_tiles,
                sequences + 1,
                search_steps(sequences + 1),
                x.stride(0),
                C=channels,
                K=width,
                SILU=silu,
                ROWS=ROWS,
                STEP=STEP,
                **options,
            )
    return y, final_states


def causal_conv1d_backward(
    dy: Tensor,
    dfinal_states: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    silu: bool,
    initial_states: Tensor | None,
    *,
    ids: Tensor | None = None,
    dx: Tensor | None = None,
) -> list[Tensor]:
    """As in reference.py. dx [T, C], whose rows may be strided, is written and is the first of the gradients; with ids
    its sum by byte value is the table's."""
    dy, x, cu_seqlens = with_dense_rows(dy), with_dense_rows(x), cu_seqlens.contiguous()
    rows, sequences = len(dy), len(cu_seqlens) - 1
    channels, width = weight.shape
    if dx is None:
        dx = x.new_empty(rows, channels)
    tile_rows = _backward_rows(rows, width)
    row_tiles = triton.cdiv(rows, tile_rows)
    parts = x.new_empty(row_tiles, (width + 1) * channels, dtype=torch.float32)
    dinitial = (
        None if initial_states is None else torch.empty_like(initial_states, memory_format=torch.contiguous_format)
    )
    states = 0 if initial_states is None else sequences
    across, options = _across(channels, 224 if initial_states is None else 248)
    with on_device(x):
        if across * (row_tiles + states):
            backward_kernel[(across * (row_tiles + states),)](
                dy,
                _contiguous(dfinal_states),
                x,
                _contiguous(ids),
                weight.contiguous(),
                _contiguous(bias),
                cu_seqlens,
                _contiguous(initial_states),
                dx,
                parts,
                dinitial,
                rows,
                row_tiles,
                tile_rows,
                sequences + 1,
                search_steps(sequences + 1),
                dy.stride(0),
                x.stride(0),
                dx.stride(0),
                C=channels,
                K=width,
                SILU=silu,
                STEP=STEP,
                **options,
            )
        sums = sum_parts(parts, torch.float32).view(width + 1, channels)
    gradients = [dx, sums[:width].flip(0).t().to(weight.dtype).contiguous()]
    if bias is not None:
        gradients.append(sums[width].to(bias.dtype, copy=True))
    return gradients if dinitial is None else [*gradients, dinitial]


def causal_conv1d_step(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    x = with_dense_rows(x)
    channels, width = weight.shape
    y = x.new_empty(x.shape)
    across, options = _across(channels, 144)
    with on_device(x):
        if across * len(x):
            step_kernel[(across * len(x),)](
                x,
                conv_state,
                weight.contiguous(),
                _contiguous(bias),
                y,
                x.stride(0),
                *conv_state.stride(),
                C=channels,
                K=width,
                SILU=silu,
                **options,
            )
    return y


def byte_conv1d(
    ids: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> Tensor:
    return causal_conv1d(table, weight, bias, cu_seqlens, silu, None, ids=ids)[0]


def byte_conv1d_backward(
    dy: Tensor, ids: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> list[Tensor]:
    dx, *rest = causal_conv1d_backward(dy, None, table, weight, bias, cu_seqlens, silu, None, ids=ids)
    return [byte_table_backward(dx, ids), *rest]


def _backward_rows(rows: int, width: int) -> int:
    """Rows that a program of the backward pass owns: at the most as many as keep its parts below 1 % of a bf16 x, fewer
    where there would be too few programs. With the K-1 rows after them they fill whole steps."""
    steps = triton.cdiv(min(1024, max(64, rows // 128)), STEP)
    return steps * STEP - (width - 1)


def _across(channels: int, registers: int) -> tuple[int, dict[str, int]]:
    """Programs side by side, and the launch options of each: four channels a thread at the most, and as many registers
    as the kernel needs: given more, it takes them to have fewer warps at a time."""
    block = min(128, triton.next_power_of_2(max(1, channels)))
    return triton.cdiv(channels, block), {"BLOCK_C": block, "num_warps": 1, "maxnreg": registers}


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()
