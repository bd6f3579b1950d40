"""dechunk as a torch.library op."""

from typing import Any

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.route import Routing


def _why_not_native(*args: Any) -> str | None:
    """Why the extension can't serve these arguments of dechunk, or of its backward, or None."""
    matrices = [value for value in args if isinstance(value, Tensor) and value.dim() == 2]  # du, chunks, residual
    dtypes = [value.dtype for value in matrices]
    if any(dtype not in (torch.float32, torch.bfloat16) for dtype in dtypes):
        return f"rows must be float32 or bfloat16, got {', '.join(map(str, dtypes))}"
    return dispatch.extension_refusal()


_implementations = dict(
    triton=dispatch.triton("dechunk"),
    native=dispatch.Implementation("bytekernels.dechunk.native", devices=("cpu",), why_not=_why_not_native),
    reference=dispatch.reference("dechunk"),
)
_dechunk = dispatch.Dispatch("dechunk", **_implementations)
_dechunk_backward = dispatch.Dispatch("dechunk_backward", **_implementations)


@torch.library.custom_op("bytekernels::dechunk", mutates_args=())
def dechunk_op(
    chunks: Tensor,
    chunk_of: Tensor,
    index: Tensor,
    cu_chunks: Tensor,
    weight: Tensor | None,
    null: Tensor | None,
    residual: Tensor | None,
    confidence: Tensor | None,
) -> Tensor:
    return _dechunk(chunks, chunk_of, index, cu_chunks, weight, null, residual, confidence)


@dechunk_op.register_fake
def _(chunks: Tensor, chunk_of: Tensor, *options: Tensor | None) -> Tensor:
    residual = options[4]
    dtype = chunks.dtype if residual is None else torch.promote_types(chunks.dtype, residual.dtype)
    return chunks.new_empty(chunk_of.shape[0], chunks.shape[1], dtype=dtype)


@torch.library.custom_op("bytekernels::dechunk_backward", mutates_args=())
def dechunk_backward_op(
    du: Tensor,
    chunks: Tensor,
    chunk_of: Tensor,
    index: Tensor,
    cu_chunks: Tensor,
    weight: Tensor | None,
    null: Tensor | None,
    confidence: Tensor | None,
) -> list[Tensor]:
    return _dechunk_backward(du, chunks, chunk_of, index, cu_chunks, weight, null, confidence)


@dechunk_backward_op.register_fake
def _(du: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return dispatch.fake_gradients(inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *layout, weight, null, residual, confidence = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(*layout, weight, null, confidence)


def _differentiate(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
    du = du.contiguous()
    *_, weight, null, confidence = ctx.saved_tensors
    dchunks, *rest = dechunk_backward_op(du, *ctx.saved_tensors)
    given = iter(rest)
    dweight, dnull, dconfidence = (None if value is None else next(given) for value in (weight, null, confidence))
    dresidual = None if ctx.residual_dtype is None else du.to(ctx.residual_dtype)
    return dchunks, None, None, None, dweight, dnull, dresidual, dconfidence


dechunk_op.register_autograd(_differentiate, setup_context=_setup)


def dechunk(
    chunks: Tensor,
    routing: Routing,
    *,
    weight: Tensor | None = None,
    null: Tensor | None = None,
    residual: Tensor | None = None,
    confidence: Tensor | None = None,
) -> Tensor:
    """A row for each byte from the chunks known at it.

    ``z_m = w_m c_m + (1 - w_m) z_{m-1}`` within each sequence, w = 1 at its first chunk;
    ``u_t = z_{chunk_of[t]} + residual_t``, with ``null`` in place of z before the first chunk (Hwang et al. 2025,
    arXiv 2507.07955, equations 5 to 9). A weight that looks ahead of byte t betrays the byte that position t predicts.

    Args:
        chunks: [M, D], a floating dtype.
        routing: M chunks over T bytes.
        weight: [M] in [0, 1], or None for 1: hold the newest chunk.
        null: [D], or None for zeros.
        residual: [T, D] or None, added last.
        confidence: [T] or None. Multiplies u (before the residual) straight through: by 1 in the value, with
            ``<du_t, u_t>`` as its gradient.

    Returns:
        [T, D] in chunks' dtype, promoted with the residual's. Sums are carried in float32 (float64 for float64). Rows
        of bytes whose chunk found no room in the routing's capacity are NaN.

    Raises:
        ValueError: shapes that do not match.
    """
    rows, count = routing.chunk_of.shape[0], routing.index.shape[0]
    if chunks.dim() != 2 or chunks.shape[0] != count:
        raise ValueError(
            f"chunks must have shape [{count}, D], a row for each chunk of the routing, got {list(chunks.shape)}"
        )
    width = chunks.shape[1]
    expected = {
        "weight": (weight, [count]),
        "null": (null, [width]),
        "residual": (residual, [rows, width]),
        "confidence": (confidence, [rows]),
    }
    for name, (value, shape) in expected.items():
        if value is not None and list(value.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
    return dechunk_op(chunks, routing.chunk_of, routing.index, routing.cu_chunks, weight, null, residual, confidence)
