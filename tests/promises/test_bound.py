"""A score bounds the probability of the bytes from below; more paths of bits come closer, and all of them are exact."""

import itertools
import math

import pytest
import torch

from bytekernels import BOS
from bytekernels.testing import ragged
from models import Scorer, score


def sum_over_all_paths(model, data: bytes) -> float:
    """log P(bytes), from every path of bits; BOS's bit is given, the last one is summed out."""
    paths = list(itertools.product([False, True], repeat=len(data) - 1))
    ids = torch.tensor([BOS, *data], dtype=torch.uint8).repeat(len(paths))
    boundary = torch.tensor([[True, *path, True] for path in paths]).flatten()
    cu_seqlens, _ = ragged([len(data) + 1] * len(paths))
    return float(score(model, ids, cu_seqlens, boundary).log_likelihood.logsumexp(0))


@pytest.mark.parametrize("length", [2, 6, 10])
def test_one_path_bounds_and_a_beam_comes_closer(model, length, record_property):
    data = bytes(torch.randint(0, 254, (length,), generator=torch.Generator().manual_seed(length)).tolist())
    exact = sum_over_all_paths(model, data)
    sums = [Scorer(model, beam=k).rolling([data])[0].log_likelihood for k in (1, 2, 4, 16)]
    best = Scorer(model, beam=16, combine="best").rolling([data])[0].log_likelihood
    for name, value in zip(("one path", "beam 2", "beam 4", "beam 16"), sums, strict=True):
        gap = (exact - value) / math.log(2) / length
        record_property(f"gap, {name}", gap)
        print(f"{length} bytes, {name}: {gap:.4f} bits/byte below the sum over 2^{length - 1} paths")
    assert sums == sorted(sums) and sums[-1] <= exact + 1e-5
    assert sums[0] - 1e-6 <= best <= sums[-1] + 1e-6


def test_all_paths_are_exact(model):
    data = b"chunk!"
    everything = Scorer(model, beam=2**5, margin=math.inf).rolling([data])[0].log_likelihood
    assert everything == pytest.approx(sum_over_all_paths(model, data), abs=1e-5)
