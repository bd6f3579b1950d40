"""Draws in Triton: a program for each row, which ranks the row only where top_k or top_p asks for it.

Everything after the logits is float64: at 512 logits a row that is next to nothing, and it makes a draw that differs
from another implementation's as rare as u within 1e-15 of a border.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytekernels.launch import on_device
from bytekernels.sample.reference import FACTORS, GAMMA

_FACTOR = tl.constexpr(FACTORS[0])
_OTHER_FACTOR = tl.constexpr(FACTORS[1])
_GAMMA = tl.constexpr(GAMMA)
_LAST = tl.constexpr(2**63 - 1)  # greater than the key of any token


@triton.jit
def _mixed(z):
    """The finaliser of SplitMix64."""
    z = (z ^ (z >> 30)) * _FACTOR
    z = (z ^ (z >> 27)) * _OTHER_FACTOR
    return z ^ (z >> 31)


@triton.jit
def _uniform(seed, counter):
    z = _mixed(seed.to(tl.uint64)) + (counter.to(tl.uint64) + 1) * _GAMMA
    return (_mixed(z) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _flipped(bits):
    """The bits of a float as an int32 that rises with it; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight(b_logit, best, scale):
    return tl.exp((b_logit.to(tl.float64) - best) / scale)


@triton.jit
def sample_kernel(
    p_logits,
    p_seeds,
    p_counters,
    p_temperature,
    p_top_k,
    p_top_p,
    p_min_p,
    p_drawn,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w = exp((l - max l) / temperature) where kept; the first index whose running sum of w is above u sum w."""
    i_s = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK)
    m_v = o_v < V
    b_logit = tl.load(p_logits + i_s * V + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    b_logit = tl.where(b_logit == 0.0, 0.0, b_logit)  # -0 is 0
    temperature = tl.load(p_temperature + i_s)
    top_k = tl.load(p_top_k + i_s)
    top_p = tl.load(p_top_p + i_s)
    min_p = tl.load(p_min_p + i_s)

    best = tl.max(b_logit, 0)
    possible = (tl.sum((b_logit != b_logit).to(tl.int32), 0) == 0) & (tl.abs(best) < float("inf"))
    possible &= (temperature >= 0.0) & (temperature < float("inf")) & (top_k >= 0)
    possible &= (top_p >= 0.0) & (top_p <= 1.0) & (min_p >= 0.0) & (min_p <= 1.0)
    scale = tl.where(temperature == 0.0, 1.0, temperature).to(tl.float64)
    best = best.to(tl.float64)

    b_key = (~_flipped(b_logit.to(tl.int32, bitcast=True))).to(tl.int64) << 32  # by falling logit, then by index
    b_key = tl.where(m_v, b_key | o_v, _LAST)
    first = tl.min(b_key, 0)
    last = tl.full([], _LAST, tl.int64)
    if ((top_k > 0) & (top_k < V)) | (top_p < 1.0):
        few = tl.where((top_k > 0) & (top_k < V), top_k, V)
        b_ranked = tl.sort(b_key)
        b_falling = _flipped(~(b_ranked >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        b_reached = tl.cumsum(tl.where(o_v < few, _weight(b_falling, best, scale), 0.0), 0)
        wanted = top_p.to(tl.float64) * tl.max(b_reached, 0)
        prefix = 1 + tl.sum((b_reached < wanted).to(tl.int32), 0)
        kept = tl.where(top_p < 1.0, tl.minimum(prefix, few), few)
        last = tl.max(tl.where(o_v < kept, b_ranked, first), 0)

    b_weight = _weight(b_logit, best, scale)
    b_weight = tl.where(m_v & (b_key <= last) & (b_weight >= min_p.to(tl.float64)), b_weight, 0.0)
    b_mass = tl.cumsum(b_weight, 0)
    wanted = _uniform(tl.load(p_seeds + i_s), tl.load(p_counters + i_s)) * tl.max(b_mass, 0)
    drawn = tl.min(tl.where((b_weight > 0.0) & (b_mass > wanted), o_v, BLOCK), 0)
    # A sum in the order of a tree may fall from one index to the next by an ulp, and leave none that is past.
    drawn = tl.minimum(drawn, tl.max(tl.where(b_weight > 0.0, o_v, 0), 0)).to(tl.int64)
    drawn = tl.where(temperature == 0.0, first & 0xFFFFFFFF, drawn)
    tl.store(p_drawn + i_s, tl.where(possible, drawn, -1))


def sample(
    logits: Tensor, seeds: Tensor, counters: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    rows, vocabulary = logits.shape
    drawn = torch.empty_like(seeds, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(vocabulary)
    with on_device(logits):
        if rows:
            sample_kernel[(rows,)](
                logits.contiguous(),
                *(value.contiguous() for value in (seeds, counters, temperature, top_k, top_p, min_p)),
                drawn,
                V=vocabulary,
                BLOCK=block,
                num_warps=max(1, min(8, block // 128)),
            )
    return drawn
