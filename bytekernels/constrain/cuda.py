"""Chunk ends held to a vocabulary, by the extension's CUDA kernels (csrc/cuda): two launches, no wait."""

from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array_on, where


def constrain_ends(
    ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, edges: Tensor, children: Tensor, string_ids: Tensor
) -> Tensor:
    ids, boundary = ids.contiguous(), boundary.contiguous()
    ends = boundary.new_zeros(boundary.shape)
    _C.cuda.constrain_ends(
        array_on(ids),
        array_on(cu_seqlens.contiguous()),
        array_on(boundary),
        (array_on(edges), array_on(children), array_on(string_ids)),
        array_on(edges.new_empty(ids.shape)),
        array_on(ends),
        *where(ids),
    )
    return ends
