"""Routing as torch.library ops."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.extension import native
from bytekernels.ragged import accumulation_dtype, check_cu_seqlens


def _why_not_native(*args: Any) -> str | None:
    """Why the extension can't serve these arguments of route, or of its backward, or None."""
    q, k = (value for value in args if isinstance(value, Tensor) and value.dim() == 2)
    if q.dtype != k.dtype or q.dtype not in (torch.float32, torch.bfloat16):
        return f"q and k must both be float32 or both bfloat16, got {q.dtype} and {k.dtype}"
    return dispatch.extension_refusal()


_triton = dispatch.triton("route")
_native = dispatch.Implementation("bytekernels.route.native", devices=("cpu",), why_not=_why_not_native)
_numbers = dict(triton=_triton, native=_native, reference=dispatch.reference("route"))
_rows = dict(triton=_triton, native=native("route"), reference=dispatch.reference("route"))  # of any dtype
_route = dispatch.Dispatch("route", **_numbers)
_route_backward = dispatch.Dispatch("route_backward", **_numbers)
_chunk_layout = dispatch.Dispatch("chunk_layout", **_rows)
_gather_chunks = dispatch.Dispatch("gather_chunks", **_rows)
_gather_chunks_backward = dispatch.Dispatch("gather_chunks_backward", **_rows)


class Routing(NamedTuple):
    """The chunks of a packed batch.

    Attributes:
        prob: float32 [T], probability of a boundary at each byte (float64 where it was computed in float64).
        boundary: bool [T].
        chunk_of: int32 [T], the newest chunk of the byte's sequence whose boundary is at or before it; -1 if none.
        index: int32 [M], the byte at which each chunk's boundary lies. With a capacity C it is [C]: the first C
            chunks', and -1 past the last of them.
        cu_chunks: int32 [S+1], offsets of the sequences among the chunks: the true ones, whatever the capacity.
    """

    prob: Tensor
    boundary: Tensor
    chunk_of: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    cu_chunks: Tensor

    @property
    def overflow(self) -> Tensor:
        """bool []: whether there are more chunks than ``index`` has room for. Reading it synchronises; making
        it does not.

        ``dechunk`` makes the rows of bytes whose chunk had no room NaN.
        """
        return self.cu_chunks[-1] > self.index.shape[0]

    def check(self) -> "Routing":
        """This routing, once its chunks are known to have had room; synchronises.

        Raises:
            RuntimeError: they had not, with the capacity that would do.
        """
        if bool(self.overflow):
            raise RuntimeError(
                f"{int(self.cu_chunks[-1])} chunks, but capacity={self.index.shape[0]}: route with a larger capacity"
            )
        return self


@torch.library.custom_op("bytekernels::route", mutates_args=())
def route_op(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, required: Tensor | None, lookahead: bool, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _route(q, k, cu_seqlens, required, lookahead, capacity)


@route_op.register_fake
def _(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, required: Tensor | None, lookahead: bool, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    prob = q.new_empty(q.shape[0], dtype=accumulation_dtype(q.dtype))
    boundary = q.new_empty(q.shape[0], dtype=torch.bool)
    return prob, boundary, *_fake_layout(boundary, cu_seqlens, capacity)


@torch.library.custom_op("bytekernels::route_backward", mutates_args=())
def route_backward_op(dprob: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool) -> list[Tensor]:
    return _route_backward(dprob, q, k, cu_seqlens, lookahead)


@route_backward_op.register_fake
def _(dprob: Tensor, q: Tensor, k: Tensor, cu_seqlens: Tensor, lookahead: bool) -> list[Tensor]:
    return dispatch.fake_gradients((q, k))


@torch.library.custom_op("bytekernels::chunk_layout", mutates_args=())
def chunk_layout_op(boundary: Tensor, cu_seqlens: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    return _chunk_layout(boundary, cu_seqlens, capacity)


@chunk_layout_op.register_fake
def _fake_layout(boundary: Tensor, cu_seqlens: Tensor, capacity: int | None) -> tuple[Tensor, Tensor, Tensor]:
    chunks = torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity
    chunk_of = boundary.new_empty(boundary.shape[0], dtype=torch.int32)
    return chunk_of, boundary.new_empty(chunks, dtype=torch.int32), torch.empty_like(cu_seqlens)


@torch.library.custom_op("bytekernels::gather_chunks", mutates_args=())
def gather_chunks_op(h: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    return _gather_chunks(h, index, chunk_of)


@gather_chunks_op.register_fake
def _(h: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    return h.new_empty(index.shape[0], h.shape[1])


@torch.library.custom_op("bytekernels::gather_chunks_backward", mutates_args=())
def gather_chunks_backward_op(de: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    return _gather_chunks_backward(de, index, chunk_of)


@gather_chunks_backward_op.register_fake
def _(de: Tensor, index: Tensor, chunk_of: Tensor) -> Tensor:
    return de.new_empty(chunk_of.shape[0], de.shape[1])


def _setup_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, cu_seqlens, _, ctx.lookahead, _ = inputs
    ctx.save_for_backward(q, k, cu_seqlens)


def _differentiate_route(ctx: Any, dprob: Tensor, *layout: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk = route_backward_op(dprob.contiguous(), *ctx.saved_tensors, ctx.lookahead)
    return dq, dk, None, None, None, None


def _setup_gather(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_gather(ctx: Any, de: Tensor) -> tuple[Tensor, None, None]:
    return gather_chunks_backward_op(de.contiguous(), *ctx.saved_tensors), None, None


route_op.register_autograd(_differentiate_route, setup_context=_setup_route)
gather_chunks_op.register_autograd(_differentiate_gather, setup_context=_setup_gather)


def route(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    *,
    lookahead: bool = True,
    required: Tensor | None = None,
    capacity: int | None = None,
) -> Routing:
    """Boundaries where neighbouring bytes point apart, and the chunks that they make.

    With ``lookahead`` (chunk ends, distilled models) ``prob[t] = (1 - cos(q[t], k[t+1])) / 2``, and 1 at the last byte
    of a sequence; without (chunk starts, Hwang et al. 2025, arXiv 2507.07955, equation 4)
    ``prob[t] = (1 - cos(q[t-1], k[t])) / 2``, and 1 at the first. ``boundary = prob >= 0.5``. 1e-12 is added to squared
    norms, so that a zero row has a cosine of 0. The gradient goes through prob alone, and not through the edges' ones.

    Args:
        q: [T, D], a floating dtype.
        k: [T, D].
        cu_seqlens: int32 [S+1].
        lookahead: see above. ``prob[t]`` then depends on byte t+1.
        required: bool [T], bytes that are boundaries whatever their prob, or None.
        capacity: room for this many chunks, or None for as many as there are. With a capacity every shape is fixed
            and the host never waits for the device, as CUDA graphs need; see :attr:`Routing.overflow`.

    Returns:
        :class:`Routing`. Without a capacity, reading M synchronises with the device once.

    Raises:
        TypeError: cu_seqlens that is not int32, required that is not bool.
        ValueError: shapes that do not match, offsets that do not cut T, or a capacity below 0.
    """
    if q.dim() != 2 or k.shape != q.shape:
        raise ValueError(f"q and k must have one shape [T, D], got {list(q.shape)} and {list(k.shape)}")
    if q.shape[1] == 0:
        raise ValueError(f"q and k must have at least one column, got {list(q.shape)}")
    check_cu_seqlens(cu_seqlens, q.shape[0])
    if required is not None:
        _check_flags("required", required)
        if required.shape[0] != q.shape[0]:
            raise ValueError(f"required must have shape [{q.shape[0]}], a flag a byte, got {list(required.shape)}")
    _check_capacity(capacity)
    return Routing(*route_op(q, k, cu_seqlens, required, lookahead, capacity))


def chunk_layout(boundary: Tensor, cu_seqlens: Tensor, *, capacity: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks that given boundaries make.

    Args:
        boundary: bool [T].
        cu_seqlens: int32 [S+1].
        capacity: as for :func:`route`.

    Returns:
        ``chunk_of`` int32 [T], ``index`` int32 [M] and ``cu_chunks`` int32 [S+1], as in :class:`Routing`.

    Raises:
        TypeError: a boundary that is not bool, or cu_seqlens that is not int32.
        ValueError: shapes that do not match, offsets that do not cut T, or a capacity below 0.
    """
    _check_flags("boundary", boundary)
    check_cu_seqlens(cu_seqlens, boundary.shape[0])
    _check_capacity(capacity)
    return chunk_layout_op(boundary, cu_seqlens, capacity)


def routing_of(
    boundary: Tensor, cu_seqlens: Tensor, prob: Tensor | None = None, *, capacity: int | None = None
) -> Routing:
    """A :class:`Routing` for boundaries that come from elsewhere: a tokenizer, or decoding.

    Args:
        boundary: bool [T].
        cu_seqlens: int32 [S+1].
        prob: float [T], or None for 1 at the boundaries and 0 elsewhere.
        capacity: as for :func:`route`.

    Raises:
        TypeError, ValueError: as :func:`chunk_layout`, or a prob that is not of the boundary's shape.
    """
    layout = chunk_layout(boundary, cu_seqlens, capacity=capacity)
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
        [M, D] in h's dtype; zeros where a capacity leaves room. Its gradient is scattered to the rows that were taken,
        each once.

    Raises:
        ValueError: h's rows are not the routing's bytes.
    """
    if h.dim() != 2 or h.shape[0] != routing.boundary.shape[0]:
        raise ValueError(f"h must have shape [{routing.boundary.shape[0]}, D], a row a byte, got {list(h.shape)}")
    return gather_chunks_op(h, routing.index, routing.chunk_of)


def _check_flags(name: str, flags: Tensor) -> None:
    if flags.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {flags.dtype}: compare it with a threshold first")
    if flags.dim() != 1:
        raise ValueError(f"{name} must have shape [T], got {list(flags.shape)}")


def _check_capacity(capacity: int | None) -> None:
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be at least 0, or None for as many chunks as there are, got {capacity}")
