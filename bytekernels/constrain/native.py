"""Chunk ends held to a vocabulary, through the extension: csrc/constrain.h."""

from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array, fresh, threads


def constrain_ends(
    ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, edges: Tensor, children: Tensor, string_ids: Tensor
) -> Tensor:
    ends = fresh(boundary)
    _C.constrain_ends(
        array(ids.contiguous()),
        array(cu_seqlens.contiguous()),
        array(boundary.contiguous()),
        (array(edges), array(children), array(string_ids)),
        array(ends),
        threads(),
    )
    return ends
