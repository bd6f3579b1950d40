"""Nodes of byte marginals by the extension's CUDA kernel (csrc/cuda): a thread for each boundary."""

from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array_on, where
from bytekernels.trie import NO_NODE


def token_prefix(ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, edges: Tensor, children: Tensor) -> Tensor:
    ids = ids.contiguous()
    prefix = edges.new_full(ids.shape, NO_NODE)
    _C.cuda.token_prefix(
        array_on(ids),
        array_on(cu_seqlens.contiguous()),
        array_on(boundary.contiguous()),
        array_on(edges),
        array_on(children),
        array_on(prefix),
        *where(ids),
    )
    return prefix
