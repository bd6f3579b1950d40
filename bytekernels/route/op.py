"""Routing as torch.library ops."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.ragged import accumulation_dtype, check_cu_seqlens

_route = dispatch.Dispatch("route", reference=dispatch.reference("route"))
_route_backward = dispatch.Dispatch("route_backward", reference=dispatch.reference("route"))
_chunk_layout = dispatch.Dispatch("chunk_layout", reference=dispatch.reference("route"))
_gather_chunks = dispatch.Dispatch("gather_chunks", reference=dispatch.reference("route"))
_gather_chunks_backward = dispatch.Dispatch("gather_chunks_backward", reference=dispatch.reference("route"))


class Routing(NamedTuple):
    """The chunks of a packed batch.

    Attributes:
        prob: float32 [T], probability of a boundary at each byte (float64 where it was computed in float64).
        boundary: bool [T].
        chunk_of: int32 [T], the newest chunk of the byte's sequence whose boundary is at or before it; -1 if none.
        index: int32 [M], the byte at which each chunk's boundary lies.
        cu_chunks: int32 [S+1], offsets of the sequences among the chunks.
    """

    prob: Tensor
    boundary: Tensor
    chunk_of: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    cu_chunks: Tensor


@torch.library.custom_op("bytekernels::route", mutates_args=())
def route_op(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _route(q, k, cu_seqlens, lookahead)


@route_op.register_fake
def _(q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    prob = q.new_empty(q.shape[0], dtype=accumulation_dtype(q.dtype))
    boundary = q.new_empty(q.shape[0], dtype=torch.bool)
    return prob, boundary, *_fake_layout(boundary, cu_seqlens)


@torch.library.custom_op("bytekernels::route_backward", mutates_args=())
def route_backward_op(dprob: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool) -> list[Tensor]:
    return _route_backward(dprob, q, k, cu_seqlens, lookahead)


@route_backward_op.register_fake
def _(dprob: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool) -> list[Tensor]:
    return dispatch.fake_gradients((q, k))


@torch.library.custom_op("bytekernels::chunk_layout", mutates_args=())
def chunk_layout_op(boundary: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _chunk_layout(boundary, cu_seqlens)


@chunk_layout_op.register_fake
def _fake_layout(boundary: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chunks = torch.library.get_ctx().new_dynamic_size()
    chunk_of = boundary.new_empty(boundary.shape[0], dtype=torch.int32)
    return chunk_of, boundary.new_empty(chunks, dtype=torch.int32), torch.empty_like(cu_seqlens)


@torch.library.custom_op("bytekernels::gather_chunks", mutates_args=())
def gather_chunks_op(h: Tensor, index: Tensor) -> Tensor:
    return _gather_chunks(h, index)


@gather_chunks_op.register_fake
def _(h: Tensor, index: Tensor) -> Tensor:
    return h.new_empty(index.shape[0], h.shape[1])


@torch.library.custom_op("bytekernels::gather_chunks_backward", mutates_args=())
def gather_chunks_backward_op(de: Tensor, index: Tensor, rows: int) -> Tensor:
    return _gather_chunks_backward(de, index, rows)


@gather_chunks_backward_op.register_fake
def _(de: Tensor, index: Tensor, rows: int) -> Tensor:
    return de.new_empty(rows, de.shape[1])


def _setup_route(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, ...]) -> None:
    q, k, cu_seqlens, ctx.lookahead = inputs
    ctx.save_for_backward(q, k, cu_seqlens)


def _differentiate_route(ctx: Any, dprob: Tensor, *layout: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dq, dk = route_backward_op(dprob.contiguous(), *ctx.saved_tensors, ctx.lookahead)
    return dq, dk, None, None


def _setup_gather(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    h, index = inputs
    ctx.rows = h.shape[0]
    ctx.save_for_backward(index)


def _differentiate_gather(ctx: Any, de: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return gather_chunks_backward_op(de.contiguous(), index, ctx.rows), None


route_op.register_autograd(_differentiate_route, setup_context=_setup_route)
gather_chunks_op.register_autograd(_differentiate_gather, setup_context=_setup_gather)


def route(q: Tensor, k: Tensor, cu_seqlens: Tensor, *, lookahead: bool = True) -> Routing:
    """Boundaries where neighbouring bytes point apart, and the chunks that they make.

    With ``lookahead`` (chunk ends, distilled models) ``prob[t] = (1 - cos(q[t], k[t+1])) / 2``, and 1 at the last byte
    of a sequence; without (chunk starts, Hwang et al. 2025, arXiv 2507.07955, equation 4)
    ``prob[t] = (1 - cos(q[t-1], k[t])) / 2``, and 1 at the first. ``boundary = prob >= 0.5``. 1e-12 is added to squared
    norms, so that a zero row has a cosine of 0. The gradient goes through prob alone, and not through the forced ones.

    Args:
        q: [T, D], a floating dtype.
        k: [T, D].
        cu_seqlens: int32 [S+1].
        lookahead: see above. ``prob[t]`` then depends on byte t+1.

    Returns:
        :class:`Routing`. Reading M synchronises with the device once.

    Raises:
        TypeError: cu_seqlens that is not int32.
        ValueError: shapes that do not match, or offsets that do not cut T.
    """
    if q.dim() != 2 or k.shape != q.shape:
        raise ValueError(f"q and k must have one shape [T, D], got {list(q.shape)} and {list(k.shape)}")
    check_cu_seqlens(cu_seqlens, q.shape[0])
    return Routing(*route_op(q, k, cu_seqlens, lookahead))


def chunk_layout(boundary: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks that given boundaries make.

    Args:
        boundary: bool [T].
        cu_seqlens: int32 [S+1].

    Returns:
        ``chunk_of`` int32 [T], ``index`` int32 [M] and ``cu_chunks`` int32 [S+1], as in :class:`Routing`.

    Raises:
        TypeError: a boundary that is not bool, or cu_seqlens that is not int32.
        ValueError: shapes that do not match, or offsets that do not cut T.
    """
    if boundary.dtype != torch.bool:
        raise TypeError(f"boundary must be bool, got {boundary.dtype}: compare it with a threshold first")
    if boundary.dim() != 1:
        raise ValueError(f"boundary must have shape [T], got {list(boundary.shape)}")
    check_cu_seqlens(cu_seqlens, boundary.shape[0])
    return chunk_layout_op(boundary, cu_seqlens)


def routing_of(boundary: Tensor, cu_seqlens: Tensor, prob: Tensor | None = None) -> Routing:
    """A :class:`Routing` for boundaries that come from elsewhere: a tokenizer, or decoding.

    Args:
        boundary: bool [T].
        cu_seqlens: int32 [S+1].
        prob: float [T], or None for 1 at the boundaries and 0 elsewhere.

    Raises:
        TypeError, ValueError: as :func:`chunk_layout`, or a prob that is not of the boundary's shape.
    """
    layout = chunk_layout(boundary, cu_seqlens)
    if prob is None:
        prob = boundary.to(torch.float32)
    elif prob.shape != boundary.shape:
        raise ValueError(f"prob must have boundary's shape {list(boundary.shape)}, got {list(prob.shape)}")
    return Routing(prob, boundary, *layout)


def gather_chunks(h: Tensor, routing: Routing) -> Tensor:
    """The row of h at each chunk's boundary.

    Args:
        h: [T, D], a floating dtype.
        routing: of the same T bytes.

    Returns:
        [M, D] in h's dtype. Its gradient is scattered to the rows that were taken, each once.

    Raises:
        ValueError: h's rows are not the routing's bytes.
    """
    if h.dim() != 2 or h.shape[0] != routing.boundary.shape[0]:
        raise ValueError(f"h must have shape [{routing.boundary.shape[0]}, D], a row a byte, got {list(h.shape)}")
    return gather_chunks_op(h, routing.index)
