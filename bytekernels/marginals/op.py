"""Byte marginals as torch.library ops. They are a teacher's: no gradient goes through them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.extension import cuda, native
from bytekernels.ragged import accumulation_dtype, check_chunked, check_cu_seqlens, check_indices
from bytekernels.trie import ByteTrie


def _why_not_native(logits: Tensor, *_: Any) -> str | None:
    if logits.dtype == torch.float64:
        return f"logits must be float32, bfloat16 or float16, got {logits.dtype}"
    return dispatch.extension_refusal()


_byte_marginals = dispatch.Dispatch(
    "byte_marginals",
    triton=dispatch.triton("marginals"),
    native=dispatch.Implementation("bytekernels.marginals.native", devices=("cpu",), why_not=_why_not_native),
    reference=dispatch.reference("marginals"),
)
_token_prefix = dispatch.Dispatch(
    "token_prefix", native=native("marginals"), cuda=cuda("marginals"), reference=dispatch.reference("marginals")
)


class SortedVocabulary(ByteTrie):
    """A vocabulary by prefixes: the :class:`~bytekernels.trie.ByteTrie` of its strings, and they in sorted order.

    The strings that begin with a node's string lie together in that order, its own (of several ids, by id) first, then
    those below each of its children, one child after the other.

    An id that ends the text may be given a byte of its own, ``b"\\xff"``; as an empty entry it is left out and the
    probabilities are those given that the text goes on.

    Attributes:
        order: int32 [n], the ids of the n entries that are not empty, sorted as byte strings.
        spans: int32 [N, 3]: in that order the strings of node n are ``spans[n, 0]`` to ``spans[n, 1]``, and the longer
            ones that begin with them ``spans[n, 1]`` to ``spans[n, 2]``.
    """

    order: Tensor
    spans: Tensor

    def __init__(self, strings: Sequence[bytes]) -> None:
        super().__init__(strings)
        nodes, children = self.nodes.numpy(), self.children.numpy()
        parents = self.edges.numpy() >> 8
        depths = list(zip(self.levels[1:], self.levels[2:], strict=False))
        tokens = np.flatnonzero(nodes >= 0)
        own = np.bincount(nodes[tokens], minlength=self.levels[-1])
        all_below = own.copy()
        for first, last in reversed(depths):
            np.add.at(all_below, parents[first:last], all_below[first:last])
        begin = np.zeros_like(own)
        for first, last in depths:
            above, below = parents[first:last], all_below[first:last]
            before = below.cumsum() - below  # in the level
            begin[first:last] = begin[above] + own[above] + before - before[children[above] - first]
        spans = np.stack([begin, begin + own, begin + all_below], axis=1)
        order = tokens[begin[nodes[tokens]].argsort(kind="stable")]
        self.order, self.spans = (torch.from_numpy(array.astype(np.int32)) for array in (order, spans))


@torch.library.custom_op("bytekernels::token_prefix", mutates_args=())
def token_prefix_op(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, edges: Tensor, children: Tensor) -> Tensor:
    check_cu_seqlens(cu_seqlens, ids.shape[0])
    return _token_prefix(ids, cu_seqlens, boundary, edges, children)


@token_prefix_op.register_fake
def _(ids: Tensor, *_: Tensor) -> Tensor:
    return ids.new_empty(ids.shape, dtype=torch.int32)


@torch.library.custom_op("bytekernels::byte_marginals", mutates_args=())
def byte_marginals_op(
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
    check_indices(chunk_of, "chunk_of", "T", -1, logits.shape[0], "chunks")
    check_indices(prefix, "prefix", "T", -1, levels[-1], "nodes")
    return _byte_marginals(logits, chunk_of, prefix, edges, children, nodes, levels, order, spans)


@byte_marginals_op.register_fake
def _(logits: Tensor, chunk_of: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(chunk_of.shape[0], 512, dtype=accumulation_dtype(logits.dtype))


def token_prefix(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, vocabulary: SortedVocabulary) -> Tensor:
    """The node of the bytes since the newest chunk end, this byte included: what :func:`byte_marginals` reads.

    Args:
        ids: uint8 [T].
        cu_seqlens: int32 [S+1].
        boundary: bool [T], the chunk ends. The node of a chunk end is 0, the empty string.
        vocabulary: on the same device.

    Returns:
        int32 [T]; -1 before the first chunk end of a sequence, and from where the bytes begin no token until the next.
        One byte at a time it is ``vocabulary.child(node, byte)``.

    Raises:
        TypeError: ids that are not uint8, a boundary that is not bool, or cu_seqlens that is not int32.
        ValueError: shapes that do not match, or offsets that do not cut T.
    """
    check_chunked(ids, boundary)
    return token_prefix_op(ids, cu_seqlens, boundary, vocabulary.edges, vocabulary.children)


def byte_marginals(logits: Tensor, vocabulary: SortedVocabulary, chunk_of: Tensor, prefix: Tensor) -> Tensor:
    """The distribution of (next byte, does a chunk end on it) that a token model implies, exactly.

    With s the bytes since the chunk began, p the token model's distribution at that chunk (over the entries that are
    not empty) and Z the probability of the tokens that begin with s and are longer:
    ``P(x, end | s) = p(s x) / Z`` and ``P(x, go on | s) = p(longer than s x, beginning with it) / Z``. Along a token
    the product is p(token).

    Args:
        logits: [M, V], the next-token logits at each chunk end, a floating dtype. Not differentiated.
        vocabulary: the bytes of the V tokens, on the same device.
        chunk_of: int32 [T], as in :class:`~bytekernels.route.Routing`.
        prefix: int32 [T], from :func:`token_prefix`.

    Returns:
        Log-probabilities [T, 512], float32 (float64 for float64 logits): ``[t, x]`` of byte x at t+1 with its chunk
        going on, ``[t, 256 + x]`` of byte x ending it, as in next_byte_targets. A row with no distribution is -inf
        throughout, and its exp counts for nothing as a soft target: before the first chunk, where the bytes since the
        chunk began are the beginning of no longer token, or where the probability of all such tokens underflows
        (in float32, some 87 nats below the likeliest token's). So are the rows of a chunk whose logits hold NaN, or
        whose greatest is not finite.

    Raises:
        TypeError: logits that are not floating, chunk_of or prefix that are not int32.
        ValueError: shapes that do not match, a chunk or a node that there is not (on a CUDA device such a row has no
            distribution, unless ``BYTEKERNELS_VALIDATE=1`` is set).
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating dtype, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] != len(vocabulary):
        raise ValueError(
            f"logits must have shape [M, {len(vocabulary)}], a column for each vocabulary entry, got "
            f"{list(logits.shape)}: pad the vocabulary with b'' or cut the logits"
        )
    if chunk_of.dim() != 1 or prefix.shape != chunk_of.shape:
        raise ValueError(
            f"chunk_of and prefix must have one shape [T], got {list(chunk_of.shape)} and {list(prefix.shape)}"
        )
    return byte_marginals_op(
        logits.detach(),
        chunk_of,
        prefix,
        vocabulary.edges,
        vocabulary.children,
        vocabulary.nodes,
        vocabulary.levels,
        vocabulary.order,
        vocabulary.spans,
    )
