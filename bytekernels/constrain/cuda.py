"""Chunk ends held to a vocabulary, by the extension's CUDA kernels (csrc/cuda): two launches, no wait."""

import torch
from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array_on, where


def constrain_ends(ids: Tensor, cu_seqlens: Tensor, log_odds: Tensor, given: Tensor, *tree: Tensor) -> Tensor:
    ids = ids.contiguous()
    ends = ids.new_zeros(ids.shape, dtype=torch.bool)
    choices, best, before = (ids.new_empty(ids.shape, dtype=dtype) for dtype in (torch.int64, torch.float64, ids.dtype))
    _C.cuda.constrain_ends(
        array_on(ids),
        array_on(cu_seqlens.contiguous()),
        array_on(log_odds.contiguous()),
        array_on(given.contiguous()),
        tuple(map(array_on, tree)),
        array_on(choices),
        array_on(best),
        array_on(before),
        array_on(ends),
        *where(ids),
    )
    return ends
