"""Routing in Triton.

Three launches whatever the batch: probabilities and the boundaries in each tile of rows; the running sum of those
counts; the layout. A *gap* lies before each row and after the last: gap j compares q's row j-1 with k's row j, unless
a sequence starts or ends there. ``prob[t]`` is that of gap t+1 (lookahead) or t.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytekernels.launch import first_at_or_after, on_device, row_pieces, search_steps, whole_rows, with_dense_rows
from bytekernels.route.reference import EPS

TILE = tl.constexpr(32)  # rows whose boundaries are counted together
LAYOUT_ROWS = 1024
LAYOUT_SEQUENCES = 64


@triton.jit
def _load_gap(p_q, p_k, p_cu, o_gap, rows, entries, steps, stride_q, stride_k, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows either side of each gap [BLOCK, BLOCK_D], zero where there is nothing to compare, and whether there is."""
    o_d = tl.arange(0, BLOCK_D)
    o_edge = first_at_or_after(p_cu, entries, o_gap, steps)
    m_edge = tl.load(p_cu + o_edge, mask=o_edge < entries, other=-1) == o_gap
    m_gap = (o_gap > 0) & (o_gap < rows) & ~m_edge
    m_both = m_gap[:, None] & (o_d < D)[None, :]
    b_q = tl.load(p_q + (o_gap - 1)[:, None] * stride_q + o_d[None, :], mask=m_both, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + o_gap[:, None] * stride_k + o_d[None, :], mask=m_both, other=0.0).to(tl.float32)
    return b_q, b_k, m_gap


@triton.jit
def _cosine(b_q, b_k, eps: tl.constexpr):
    b_scale_q = 1.0 / tl.sqrt(tl.sum(b_q * b_q, 1) + eps)
    b_scale_k = 1.0 / tl.sqrt(tl.sum(b_k * b_k, 1) + eps)
    return tl.sum(b_q * b_k, 1) * b_scale_q * b_scale_k, b_scale_q, b_scale_k


@triton.heuristics({"HAS_REQUIRED": lambda args: args["p_required"] is not None})
@triton.jit(do_not_specialize=["rows", "entries", "steps"])
def probability_kernel(
    p_q,
    p_k,
    p_cu,
    p_required,
    p_prob,
    p_boundary,
    p_counts,
    rows,
    entries,
    steps,
    stride_q,
    stride_k,
    D: tl.constexpr,
    LOOKAHEAD: tl.constexpr,
    EPSILON: tl.constexpr,
    HAS_REQUIRED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """prob = (1 - cos) / 2, boundary = prob >= 1/2, and the number of boundaries in the tile."""
    i_tile = tl.program_id(0).to(tl.int64)
    n_boundaries = 0
    for i in range(0, TILE, BLOCK_T):
        o_t = i_tile * TILE + i + tl.arange(0, BLOCK_T)
        m_t = o_t < rows
        o_gap = o_t + 1 if LOOKAHEAD else o_t
        b_q, b_k, m_gap = _load_gap(p_q, p_k, p_cu, o_gap, rows, entries, steps, stride_q, stride_k, D, BLOCK_D)
        b_cosine, _, _ = _cosine(b_q, b_k, EPSILON)
        b_prob = tl.where(m_gap, (1.0 - b_cosine) * 0.5, 1.0)
        b_prob = tl.where(b_prob < 0.0, 0.0, tl.where(b_prob > 1.0, 1.0, b_prob))  # NaN stays
        m_boundary = b_prob >= 0.5
        if HAS_REQUIRED:
            m_boundary = m_boundary | (tl.load(p_required + o_t, mask=m_t, other=0) != 0)
        m_boundary = m_boundary & m_t
        tl.store(p_prob + o_t, b_prob, mask=m_t)
        tl.store(p_boundary + o_t, m_boundary.to(tl.uint8), mask=m_t)
        n_boundaries += tl.sum(m_boundary.to(tl.int32), 0)
    tl.store(p_counts + i_tile, n_boundaries)


@triton.jit(do_not_specialize=["rows", "tiles"])
def count_kernel(p_boundary, p_counts, rows, tiles, BLOCK_N: tl.constexpr):
    """The number of boundaries in each tile."""
    o_tile = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_t = o_tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    b_boundary = tl.load(p_boundary + o_t, mask=o_t < rows, other=0).to(tl.int32)
    tl.store(p_counts + o_tile, tl.sum(b_boundary, 1), mask=o_tile < tiles)


@triton.jit(do_not_specialize=["tiles"])
def offsets_kernel(p_counts, p_offsets, tiles, BLOCK_N: tl.constexpr):
    """offsets[i] = sum of counts[:i], for i in [0, tiles]. One program."""
    n_before = 0
    for i in range(0, tiles + 1, BLOCK_N):
        o_tile = i + tl.arange(0, BLOCK_N)
        b_count = tl.load(p_counts + o_tile, mask=o_tile < tiles, other=0)
        tl.store(p_offsets + o_tile, n_before + tl.cumsum(b_count, 0) - b_count, mask=o_tile <= tiles)
        n_before += tl.sum(b_count, 0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _boundaries_before(p_boundary, p_offsets, o_row):
    """Boundaries before each of some rows [N]."""
    o_tile = o_row // TILE
    o_t = o_tile[:, None].to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    b_boundary = tl.load(p_boundary + o_t, mask=o_t < o_row[:, None], other=0).to(tl.int32)
    return tl.load(p_offsets + o_tile) + tl.sum(b_boundary, 1)


@triton.jit(do_not_specialize=["rows", "row_blocks", "capacity", "entries", "steps"])
def layout_kernel(
    p_boundary,
    p_offsets,
    p_cu,
    p_chunk_of,
    p_index,
    p_cu_chunks,
    rows,
    row_blocks,
    capacity,
    entries,
    steps,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The first row_blocks programs write chunk_of and index, the others cu_chunks."""
    i_block = tl.program_id(0).to(tl.int64)
    if i_block < row_blocks:
        o_t = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
        m_t = o_t < rows
        b_boundary = tl.load(p_boundary + o_t, mask=m_t, other=0).to(tl.int32)
        b_newest = tl.load(p_offsets + i_block * (BLOCK_T // TILE)) + tl.cumsum(b_boundary, 0) - 1
        # The first chunk of a row's sequence is the number of boundaries before the sequence's first row. That row is
        # in this block, or the sequence is the one that the block begins in.
        o_after = first_at_or_after(p_cu, entries, o_t + 1, steps)
        o_start = tl.load(p_cu + o_after - 1, mask=m_t, other=rows)
        o_entering = tl.min(o_start, 0) + tl.zeros([1], dtype=tl.int32)
        b_first = tl.where(m_t & (o_start == o_t), b_newest + 1 - b_boundary, 0)
        b_first = tl.associative_scan(b_first, 0, _larger)
        b_first = tl.maximum(b_first, _boundaries_before(p_boundary, p_offsets, o_entering))
        tl.store(p_chunk_of + o_t, tl.where(b_newest >= b_first, b_newest, -1), mask=m_t)
        tl.store(p_index + b_newest, o_t.to(tl.int32), mask=(b_boundary != 0) & (b_newest < capacity))
    else:
        o_s = (i_block - row_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
        m_s = o_s < entries
        o_row = tl.load(p_cu + o_s, mask=m_s, other=0)
        tl.store(p_cu_chunks + o_s, _boundaries_before(p_boundary, p_offsets, o_row), mask=m_s)


@triton.jit(do_not_specialize=["rows", "entries", "steps"])
def backward_kernel(
    p_dprob,
    p_q,
    p_k,
    p_cu,
    p_dq,
    p_dk,
    rows,
    entries,
    steps,
    stride_q,
    stride_k,
    D: tl.constexpr,
    LOOKAHEAD: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With unit rows a, b of a gap: dq = (b - cos a) dcos / |q|, dk = (a - cos b) dcos / |k|, dcos = -dprob / 2."""
    o_gap = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_q, b_k, m_gap = _load_gap(p_q, p_k, p_cu, o_gap, rows, entries, steps, stride_q, stride_k, D, BLOCK_D)
    b_cosine, b_scale_q, b_scale_k = _cosine(b_q, b_k, EPSILON)
    o_prob = o_gap - 1 if LOOKAHEAD else o_gap
    m_gap = m_gap & ~(tl.abs(b_cosine) > 1.0)
    b_dcosine = -0.5 * tl.load(p_dprob + o_prob, mask=m_gap, other=0.0)
    b_a = b_q * b_scale_q[:, None]
    b_b = b_k * b_scale_k[:, None]
    b_dq = (b_dcosine * b_scale_q)[:, None] * (b_b - b_cosine[:, None] * b_a)
    b_dk = (b_dcosine * b_scale_k)[:, None] * (b_a - b_cosine[:, None] * b_b)
    m_q = ((o_gap > 0) & (o_gap <= rows))[:, None] & (o_d < D)
    m_k = (o_gap < rows)[:, None] & (o_d < D)
    tl.store(p_dq + (o_gap - 1)[:, None] * D + o_d, b_dq, mask=m_q)
    tl.store(p_dk + o_gap[:, None] * D + o_d, b_dk, mask=m_k)


@triton.jit(do_not_specialize=["chunks"])
def gather_kernel(p_h, p_index, p_out, chunks, stride_h, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[m] = h[index[m]], zeros where index is -1."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    m_m = o_m < chunks
    o_row = tl.load(p_index + o_m, mask=m_m, other=-1).to(tl.int64)
    b_h = tl.load(p_h + o_row[:, None] * stride_h + o_d, mask=(o_row >= 0)[:, None] & (o_d < D), other=0.0)
    tl.store(p_out + o_m[:, None] * D + o_d, b_h, mask=m_m[:, None] & (o_d < D))


@triton.jit(do_not_specialize=["rows", "capacity"])
def scatter_kernel(
    p_de, p_index, p_chunk_of, p_dh, rows, capacity, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dh[t] = de[chunk_of[t]] where t is that chunk's boundary, else zeros."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    m_t = o_t < rows
    o_m = tl.load(p_chunk_of + o_t, mask=m_t, other=-1).to(tl.int64)
    m_m = (o_m >= 0) & (o_m < capacity)
    m_own = m_m & (tl.load(p_index + o_m, mask=m_m, other=-1) == o_t)
    b_de = tl.load(p_de + o_m[:, None] * D + o_d, mask=m_own[:, None] & (o_d < D), other=0.0)
    tl.store(p_dh + o_t[:, None] * D + o_d, b_de, mask=m_t[:, None] & (o_d < D))


def route(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, required: Tensor | None, lookahead: bool, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, cu_seqlens = with_dense_rows(q), with_dense_rows(k), cu_seqlens.contiguous()
    rows, width = q.shape
    prob = q.new_empty(rows, dtype=torch.float32)
    boundary = q.new_empty(rows, dtype=torch.bool)
    counts = q.new_empty(triton.cdiv(rows, TILE.value), dtype=torch.int32)
    block_t, block_d, warps = whole_rows(width)
    with on_device(q):
        if rows:
            probability_kernel[(len(counts),)](
                q,
                k,
                cu_seqlens,
                None if required is None else required.contiguous().view(torch.uint8),
                prob,
                boundary.view(torch.uint8),
                counts,
                rows,
                len(cu_seqlens),
                search_steps(len(cu_seqlens)),
                q.stride(0),
                k.stride(0),
                D=width,
                LOOKAHEAD=lookahead,
                EPSILON=EPS,
                BLOCK_T=min(block_t, TILE.value),
                BLOCK_D=block_d,
                num_warps=warps,
            )
        layout = _layout(boundary, counts, cu_seqlens, capacity)
    return prob, boundary, *layout


def route_backward(dprob: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool) -> list[Tensor]:
    q, k, cu_seqlens = with_dense_rows(q), with_dense_rows(k), cu_seqlens.contiguous()
    rows, width = q.shape
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    block_t, block_d, warps = whole_rows(width)
    with on_device(q):
        if rows:
            backward_kernel[(triton.cdiv(rows + 1, block_t),)](
                dprob.contiguous(),
                q,
                k,
                cu_seqlens,
                dq,
                dk,
                rows,
                len(cu_seqlens),
                search_steps(len(cu_seqlens)),
                q.stride(0),
                k.stride(0),
                D=width,
                LOOKAHEAD=lookahead,
                EPSILON=EPS,
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                num_warps=warps,
            )
    return [dq, dk]


def chunk_layout(boundary: Tensor, cu_seqlens: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    boundary, cu_seqlens = boundary.contiguous(), cu_seqlens.contiguous()
    tiles = triton.cdiv(len(boundary), TILE.value)
    counts = boundary.new_empty(tiles, dtype=torch.int32)
    with on_device(boundary):
        if tiles:
            count_kernel[(triton.cdiv(tiles, 32),)](
                boundary.view(torch.uint8), counts, len(boundary), tiles, BLOCK_N=32, num_warps=4
            )
        return _layout(boundary, counts, cu_seqlens, capacity)


def _layout(
    boundary: Tensor, counts: Tensor, cu_seqlens: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The layout, given the boundaries in each tile of rows."""
    rows, entries = len(boundary), len(cu_seqlens)
    offsets = counts.new_empty(len(counts) + 1)
    chunk_of, cu_chunks = counts.new_empty(rows), torch.empty_like(cu_seqlens)
    index = counts.new_empty(rows) if capacity is None else counts.new_full((capacity,), -1)
    offsets_kernel[(1,)](counts, offsets, len(counts), BLOCK_N=1024, num_warps=4)
    row_blocks = triton.cdiv(rows, LAYOUT_ROWS)
    layout_kernel[(row_blocks + triton.cdiv(entries, LAYOUT_SEQUENCES),)](
        boundary.view(torch.uint8),
        offsets,
        cu_seqlens,
        chunk_of,
        index,
        cu_chunks,
        rows,
        row_blocks,
        len(index),
        entries,
        search_steps(entries),
        BLOCK_T=LAYOUT_ROWS,
        BLOCK_S=LAYOUT_SEQUENCES,
        num_warps=8,
    )
    if capacity is None:
        index = index[: int(offsets[-1])]  # the one read of M
    return chunk_of, index, cu_chunks


def gather_chunks(h: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    h, index = with_dense_rows(h), index.contiguous()
    chunks, width = len(index), h.shape[1]
    out = h.new_empty(chunks, width)
    block_m, block_d, options = row_pieces(width)
    with on_device(h):
        if chunks and width:
            gather_kernel[(triton.cdiv(chunks, block_m), triton.cdiv(width, block_d))](
                h, index, out, chunks, h.stride(0), D=width, BLOCK_M=block_m, BLOCK_D=block_d, **options
            )
    return out


def gather_chunks_backward(de: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    rows, width = len(chunk_of), de.shape[1]
    de, index, chunk_of = de.contiguous(), index.contiguous(), chunk_of.contiguous()
    dh = de.new_empty(rows, width)
    block_t, block_d, options = row_pieces(width)
    with on_device(de):
        if rows and width:
            scatter_kernel[(triton.cdiv(rows, block_t), triton.cdiv(width, block_d))](
                de,
                index,
                chunk_of,
                dh,
                rows,
                len(index),
                D=width,
                BLOCK_T=block_t,
                BLOCK_D=block_d,
                **options,
            )
    return dh
