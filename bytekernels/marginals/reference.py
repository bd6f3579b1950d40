"""Byte marginals of a token model in plain PyTorch: the specification.

With s the bytes since the chunk began and Z the probability of the tokens that begin with s and are longer,
``P(x, end | s) = p(s x) / Z`` and ``P(x, go on | s) = p(longer than s x, beginning with it) / Z``. Every sum is of
non-negative terms, level by level from the longest strings up: even the rarest branch keeps its relative precision.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bytekernels.ragged import accumulation_dtype, segment_ids
from bytekernels.trie import NO_NODE, child_of

BLOCK = 2**22  # elements of [nodes, chunks] that are in memory at once


def token_prefix(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, edges: Tensor, children: Tensor) -> Tensor:
    prefix = torch.full_like(ids, NO_NODE, dtype=torch.int32)
    prefix[boundary] = 0
    sequence = segment_ids(cu_seqlens, ids.shape[0])
    goes_on = torch.zeros_like(boundary)  # whether the next byte belongs to the same chunk
    goes_on[:-1] = ~boundary[1:] & (sequence[1:] == sequence[:-1])
    rows = boundary.nonzero().flatten()
    while rows.numel():
        rows = rows[goes_on[rows]] + 1
        node = child_of(edges, prefix[rows - 1], ids[rows])
        prefix[rows] = node
        rows = rows[node >= 0]
    return prefix


def subtree_weights(
    logits: Tensor, tokens: Tensor, counts: Tensor, children: Tensor, levels: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Of each node, up to one factor a chunk, the probability of its own string and of the longer ones: [N, M] each.

    The tokens are in the order of their nodes, so many (counts) at each node.
    """
    scores = logits.T.index_select(0, tokens).to(accumulation_dtype(logits.dtype))
    own = _sum_runs((scores - scores.amax(0)).exp_(), counts)
    longer = torch.zeros_like(own)
    for first, last, end in reversed(list(zip(levels, levels[1:], levels[2:], strict=False))):
        below = own[last:end] + longer[last:end]
        longer[first:last] = _sum_runs(below, children[first + 1 : last + 1] - children[first:last])
    return own, longer


def _sum_runs(values: Tensor, counts: Tensor) -> Tensor:
    """Sums of consecutive rows, so many for each: [len(counts), M], in the order of the rows on every device."""
    if values.device.type != "cpu":
        return torch.segment_reduce(values, "sum", lengths=counts, axis=0, unsafe=True)
    runs = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return values.new_zeros(len(counts), values.shape[1]).index_add_(0, runs, values)  # ten times as fast there


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
    wide = accumulation_dtype(logits.dtype)
    out = logits.new_full((chunk_of.shape[0], 512), -torch.inf, dtype=wide)
    known = (chunk_of >= 0) & (prefix >= 0)
    tokens = nodes.argsort(stable=True)[int((nodes < 0).sum()) :]
    tokens_at = torch.bincount(nodes[tokens], minlength=levels[-1])
    chunks = max(1, BLOCK // levels[-1])
    for start in range(0, logits.shape[0], chunks):
        own, longer = subtree_weights(logits[start : start + chunks], tokens, tokens_at, children, levels)
        rows = (known & (chunk_of >= start) & (chunk_of < start + chunks)).nonzero().flatten()
        node = prefix[rows].to(torch.int64)
        counts = (children[node + 1] - children[node]).to(torch.int64)
        each = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)  # a child of rows[each]
        rank = torch.arange(len(each), device=rows.device) - (counts.cumsum(0) - counts)[each]
        child = children[node][each] + rank
        chunk = (chunk_of[rows] - start)[each]
        byte = (edges[child] & 255).to(torch.int64)
        total = longer[node[each], chunk]
        for half, weights in enumerate((longer, own)):
            weight = weights[child, chunk]
            # log 0 - log 0 where every token below has underflowed: such a row stays without a distribution.
            out[rows[each], 256 * half + byte] = torch.where(weight > 0, weight.log() - total.log(), -torch.inf)
    return out
