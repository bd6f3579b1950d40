"""Byte marginals in Triton: two launches, sums of non-negative numbers alone, in an order that the vocabulary decides.

With the weights w = exp(l - max l) in the order of the strings, what follows a row's prefix are sums over intervals of
them. The first kernel, a program for each chunk, sums blocks of 32 and of 1024 weights; the second, a program for each
row, adds up each of its 512 intervals from whole blocks and, at the ends, from blocks of the finer kind and from single
weights, which it makes anew. Sums are float64, so that what a row and the row before say of the same strings agrees.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytekernels.launch import first_at_or_after, on_device, search_steps, with_dense_rows

BLOCK = tl.constexpr(32)  # weights in a fine block, and fine blocks in a coarse one
TILE = 4096  # weights that a program makes at a time
BYTES = tl.constexpr(256)
CHILDREN_STEPS = tl.constexpr(search_steps(256))


@triton.jit(do_not_specialize=["tokens", "fine", "coarse"])
def block_sums_kernel(
    p_logits, p_order, p_greatest, p_fine, p_coarse, tokens, fine, coarse, stride, TILE: tl.constexpr
):
    """Of a chunk: max l, NaN where one l is; sums of w over blocks of BLOCK and of BLOCK * BLOCK tokens."""
    i_m = tl.program_id(0).to(tl.int64)
    p_logits += i_m * stride
    b_greatest = tl.full([TILE], float("-inf"), tl.float32)
    b_unordered = tl.zeros([TILE], tl.int32)
    for i in range(0, tokens, TILE):
        o_i = i + tl.arange(0, TILE)
        o_v = tl.load(p_order + o_i, mask=o_i < tokens, other=0)
        b_logit = tl.load(p_logits + o_v, mask=o_i < tokens, other=float("-inf")).to(tl.float32)
        b_greatest = tl.maximum(b_greatest, b_logit)
        b_unordered += (b_logit != b_logit).to(tl.int32)
    greatest = tl.where(tl.sum(b_unordered, 0) > 0, float("nan"), tl.max(b_greatest, 0))
    tl.store(p_greatest + i_m, greatest)
    for i in range(0, tokens, TILE):
        o_i = i + tl.arange(0, TILE)
        o_v = tl.load(p_order + o_i, mask=o_i < tokens, other=0)
        b_logit = tl.load(p_logits + o_v, mask=o_i < tokens, other=float("-inf")).to(tl.float32)
        b_weight = tl.where(o_i < tokens, tl.exp(b_logit - greatest), 0.0)
        b_fine = tl.sum(tl.reshape(b_weight, [TILE // BLOCK, BLOCK]).to(tl.float64), 1)
        o_fine = i // BLOCK + tl.arange(0, TILE // BLOCK)
        tl.store(p_fine + i_m * fine + o_fine, b_fine, mask=o_fine < fine)
        b_coarse = tl.sum(tl.reshape(b_fine, [TILE // BLOCK // BLOCK, BLOCK]), 1)
        o_coarse = i // BLOCK // BLOCK + tl.arange(0, TILE // BLOCK // BLOCK)
        tl.store(p_coarse + i_m * coarse + o_coarse, b_coarse, mask=o_coarse < coarse)


@triton.jit
def _whole_blocks(o_begin, o_end):
    """The blocks [first, end) that lie in [begin, end), and where what is before them ends and what is after begins."""
    o_first = tl.minimum((o_begin + BLOCK - 1) // BLOCK * BLOCK, o_end)
    o_last = tl.maximum(o_end // BLOCK * BLOCK, o_first)
    o_block = (o_first + BLOCK - 1) // BLOCK
    return o_block, tl.maximum(o_last // BLOCK, o_block), o_first, o_last


@triton.jit
def _weights(p_logits, p_order, o_i, m_i, greatest):
    o_v = tl.load(p_order + o_i, mask=m_i, other=0)
    b_logit = tl.load(p_logits + o_v, mask=m_i, other=float("-inf")).to(tl.float32)
    return tl.where(m_i, tl.exp(b_logit - greatest), 0.0).to(tl.float64)


@triton.jit
def _sum_of_weights(p_logits, p_order, o_begin, o_end, o_resume, o_stop, greatest):
    """Sums of w over [begin, end) and [resume, stop), one after the other: float64."""
    o_before = o_end - o_begin
    o_count = o_before + o_stop - o_resume
    b_sum = tl.zeros(o_begin.shape, tl.float64)
    for i in range(0, tl.max(o_count, 0)):
        o_i = tl.where(i < o_before, o_begin + i, o_resume + i - o_before)
        b_sum += _weights(p_logits, p_order, o_i, i < o_count, greatest)
    return b_sum


@triton.jit
def _sum_of_blocks(p_sums, o_begin, o_end, o_resume, o_stop):
    """The same of what was summed before."""
    o_before = o_end - o_begin
    o_count = o_before + o_stop - o_resume
    b_sum = tl.zeros(o_begin.shape, tl.float64)
    for i in range(0, tl.max(o_count, 0)):
        o_i = tl.where(i < o_before, o_begin + i, o_resume + i - o_before)
        b_sum += tl.load(p_sums + o_i, mask=i < o_count, other=0.0)
    return b_sum


@triton.jit
def _log_of_share(b_sum, total):
    """log(sum / total), -inf where there is nothing."""
    m_sum = b_sum > 0.0
    b_log = tl.log(tl.where(m_sum, b_sum, 1.0)) - tl.log(tl.where(total > 0.0, total, 1.0))
    return tl.where(m_sum, b_log, float("-inf")).to(tl.float32)


@triton.jit(do_not_specialize=["chunks", "nodes", "fine", "coarse"])
def marginals_kernel(
    p_logits,
    p_chunk_of,
    p_prefix,
    p_edges,
    p_children,
    p_order,
    p_spans,
    p_greatest,
    p_fine,
    p_coarse,
    p_out,
    chunks,
    nodes,
    fine,
    coarse,
    stride,
):
    """out = log w(s x) - log Z and log w(longer than s x) - log Z for each byte x after the prefix s of a row."""
    i_t = tl.program_id(0).to(tl.int64)
    i_m = tl.load(p_chunk_of + i_t).to(tl.int64)
    i_node = tl.load(p_prefix + i_t)
    o_x = tl.arange(0, BYTES)
    p_out += i_t * 2 * BYTES
    if (i_m >= 0) & (i_m < chunks) & (i_node >= 0) & (i_node < nodes):
        p_logits += i_m * stride
        i_first = tl.load(p_children + i_node)
        n_children = tl.load(p_children + i_node + 1) - i_first
        o_edge = i_node * BYTES + o_x
        o_child = first_at_or_after(p_edges + i_first, n_children, o_edge, CHILDREN_STEPS)
        m_child = o_child < n_children
        m_child &= tl.load(p_edges + i_first + o_child, mask=m_child, other=-1) == o_edge
        p_span = p_spans + (i_first + o_child).to(tl.int64) * 3
        o_own = tl.load(p_span, mask=m_child, other=0)
        o_begin = tl.load(p_span + 1, mask=m_child, other=0)
        o_end = tl.load(p_span + 2, mask=m_child, other=0)

        greatest = tl.load(p_greatest + i_m)
        b_own = _sum_of_weights(p_logits, p_order, o_own, o_begin, o_begin, o_begin, greatest)
        o_fine, o_fine_end, o_first, o_last = _whole_blocks(o_begin, o_end)
        b_longer = _sum_of_weights(p_logits, p_order, o_begin, o_first, o_last, o_end, greatest)
        o_coarse, o_coarse_end, o_first, o_last = _whole_blocks(o_fine, o_fine_end)
        b_longer += _sum_of_blocks(p_fine + i_m * fine, o_fine, o_first, o_last, o_fine_end)
        b_longer += _sum_of_blocks(p_coarse + i_m * coarse, o_coarse, o_coarse_end, o_coarse_end, o_coarse_end)

        total = tl.sum(b_own + b_longer, 0)
        tl.store(p_out + o_x, _log_of_share(b_longer, total))
        tl.store(p_out + BYTES + o_x, _log_of_share(b_own, total))
    else:
        tl.store(p_out + o_x, float("-inf"))
        tl.store(p_out + BYTES + o_x, float("-inf"))


def byte_marginals(
    logits: Tensor,
    chunk_of: Tensor,
    prefix: Tensor,
    edges: Tensor,
    children: Tensor,
    nodes: Tensor,
    levels: Sequence[int],
    order: Tensor,
    spans: Tensor,
) -> Tensor:
    logits, chunk_of, prefix = with_dense_rows(logits), chunk_of.contiguous(), prefix.contiguous()
    chunks, rows, tokens = len(logits), len(chunk_of), len(order)
    fine, coarse = triton.cdiv(tokens, BLOCK.value), triton.cdiv(tokens, BLOCK.value**2)
    greatest = logits.new_empty(chunks, dtype=torch.float32)
    sums = logits.new_empty(chunks, fine, dtype=torch.float64), logits.new_empty(chunks, coarse, dtype=torch.float64)
    out = logits.new_empty(rows, 512, dtype=torch.float32)
    sizes = fine, coarse, logits.stride(0)
    with on_device(logits):
        if chunks and rows:
            block_sums_kernel[(chunks,)](logits, order, greatest, *sums, tokens, *sizes, TILE=TILE, num_warps=8)
        if rows:
            marginals_kernel[(rows,)](
                logits,
                chunk_of,
                prefix,
                edges,
                children,
                order,
                spans,
                greatest,
                *sums,
                out,
                chunks,
                len(edges),
                *sizes,
            )
    return out
