"""One draw from each row of logits, in float64: the specification.

Tokens are ranked by falling logit, then by index. Weights are relative to the likeliest token's,
``w_i = exp((l_i - max l) / temperature)``, so that ``min_p`` compares them as they are.
"""

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def sample(
    logits: Tensor, seeds: Tensor, counters: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    logits, vocabulary = logits.double(), logits.shape[1]
    settings = temperature.double(), top_k.long(), top_p.double(), min_p.double()
    temperature, top_k, top_p, min_p = (value[:, None] for value in settings)  # [S, 1]
    best = logits.amax(1, keepdim=True)  # NaN where one is
    weights = ((logits - best) / torch.where(temperature == 0, 1.0, temperature)).exp()  # [S, V]

    rank = torch.arange(vocabulary, device=logits.device)
    order = logits.argsort(dim=1, descending=True, stable=True)
    ranked = weights.gather(1, order)
    few = torch.where(top_k == 0, vocabulary, top_k)
    reached = ranked.masked_fill(rank >= few, 0.0).cumsum(1)
    prefix = 1 + (reached < top_p * reached[:, -1:]).sum(1, keepdim=True)  # the shortest that reaches top_p
    kept = (rank < few) & ((rank < prefix) | (top_p >= 1)) & (ranked >= min_p)
    kept = torch.zeros_like(kept).scatter(1, order, kept)  # by index

    mass = weights.masked_fill(~kept, 0.0).cumsum(1)
    wanted = uniform(seeds, counters)[:, None] * mass[:, -1:]
    drawn = torch.searchsorted(mass, wanted, right=True).clamp(max=vocabulary - 1)  # the first whose mass is past it
    drawn = torch.where(temperature == 0, order[:, :1], drawn)
    possible = best.isfinite() & (temperature >= 0) & temperature.isfinite() & (top_k >= 0)
    for share in (top_p, min_p):
        possible &= (share >= 0) & (share <= 1)
    return torch.where(possible, drawn, -1)[:, 0]


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    return _shifted(_mixed(_mixed(seeds) + _signed(GAMMA) * (counters + 1)), 11).double() * 2.0**-53


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators)."""
    z = (z ^ _shifted(z, 30)) * _signed(FACTORS[0])
    z = (z ^ _shifted(z, 27)) * _signed(FACTORS[1])
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits, with zeros for the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - (1 << 64)
