"""dechunk through the extension: csrc/dechunk.h. Float32 and bfloat16 on the CPU."""

import torch
from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array, fresh, rows, threads


def dechunk(
    chunks: Tensor,
    chunk_of: Tensor,
    index: Tensor,
    cu_chunks: Tensor,
    weight: Tensor | None,
    null: Tensor | None,
    residual: Tensor | None,
    confidence: Tensor | None,
) -> Tensor:
    other = chunks.dtype if residual is None else residual.dtype
    out = fresh(chunks, (len(chunk_of), chunks.shape[1]), torch.promote_types(chunks.dtype, other))
    _C.dechunk(
        chunks.dtype == torch.bfloat16,
        other == torch.bfloat16,
        chunks.shape[1],
        _routing(chunk_of, index, cu_chunks),
        rows(chunks),
        _wide(weight),
        _wide(null),
        None if residual is None else rows(residual),
        array(out),
        threads(),
    )
    return out


def dechunk_backward(
    du: Tensor,
    chunks: Tensor,
    chunk_of: Tensor,
    index: Tensor,
    cu_chunks: Tensor,
    weight: Tensor | None,
    null: Tensor | None,
    confidence: Tensor | None,
) -> list[Tensor]:
    dchunks = fresh(chunks)
    parameters = [weight, null, confidence]  # whose gradients come in float32
    outputs = [None if value is None else value.new_empty(value.shape, dtype=torch.float32) for value in parameters]
    _C.dechunk_backward(
        chunks.dtype == torch.bfloat16,
        du.dtype == torch.bfloat16,
        chunks.shape[1],
        _routing(chunk_of, index, cu_chunks),
        rows(chunks),
        _wide(weight),
        _wide(null),
        array(du.contiguous()),
        (array(dchunks), *(None if output is None else array(output) for output in outputs)),
        threads(),
    )
    pairs = zip(outputs, parameters, strict=True)
    return [dchunks, *(out.to(value.dtype) for out, value in pairs if out is not None and value is not None)]


def _routing(*arrays: Tensor) -> tuple[tuple[int, int, Tensor], ...]:
    return tuple(array(value.contiguous()) for value in arrays)


def _wide(value: Tensor | None) -> tuple[int, int, Tensor] | None:
    return None if value is None else array(value.float().contiguous())
