"""Chunk ends held to a vocabulary, through the extension: csrc/constrain.h."""

import torch
from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array, fresh, threads


def constrain_ends(ids: Tensor, cu_seqlens: Tensor, log_odds: Tensor, given: Tensor, *tree: Tensor) -> Tensor:
    ends = fresh(ids, dtype=torch.bool)
    _C.constrain_ends(
        array(ids.contiguous()),
        array(cu_seqlens.contiguous()),
        array(log_odds.contiguous()),
        array(given.contiguous()),
        tuple(map(array, tree)),
        array(ends),
        threads(),
    )
    return ends
