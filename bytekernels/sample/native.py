"""Draws through the extension: csrc/sample.h. Logits of any dtype but float64 on the CPU."""

from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array, threads


def sample(
    logits: Tensor, seeds: Tensor, counters: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    drawn = seeds.new_empty(seeds.shape)
    rows, vocabulary = logits.shape
    settings = temperature, top_k, top_p, min_p
    _C.sample(
        (rows, vocabulary),
        array(logits.float().contiguous()),
        array(seeds.contiguous()),
        array(counters.contiguous()),
        tuple(array(value.contiguous()) for value in settings),
        array(drawn),
        threads(),
    )
    return drawn
