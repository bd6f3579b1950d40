"""The numbers that decide draws: SplitMix64's, spread over [0, 1), unrelated between seeds."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bytekernels

INTEGERS = st.integers(-(2**63), 2**63 - 1)


def mixed(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(seed=INTEGERS, counter=INTEGERS)
def test_in_integers_of_any_size(seed, counter):
    found = bytekernels.uniform(torch.tensor([seed]), torch.tensor([counter]))
    expected = mixed((mixed(seed % 2**64) + 0x9E3779B97F4A7C15 * (counter + 1)) % 2**64) >> 11
    assert found.dtype == torch.float64
    assert found.tolist() == [expected / 2**53]
    assert 0 <= found[0] < 1


def test_seed_0_gives_what_splitmix64_gives_from_0():
    outputs = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B)
    found = bytekernels.uniform(torch.zeros(5, dtype=torch.int64), torch.arange(5))
    assert found.tolist() == [(output >> 11) / 2**53 for output in outputs]


@pytest.mark.parametrize("over", ["counters", "seeds"])
def test_tenths_are_equally_frequent(over):
    numbers, zeros = torch.arange(100_000), torch.full((100_000,), 3)
    found = bytekernels.uniform(*((zeros, numbers) if over == "counters" else (numbers, zeros)))
    counts = torch.bincount((found * 10).long(), minlength=10).double()
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 9 + 4 * math.sqrt(18)
    following = torch.corrcoef(torch.stack([found[1:], found[:-1]]))[0, 1]
    assert abs(float(following)) < 4 / math.sqrt(len(found))


@pytest.mark.parametrize(
    ("seeds", "counters", "error", "message"),
    [
        (torch.zeros(2), torch.arange(2), TypeError, "seeds must be torch.int64, got torch.float32: use seeds.to("),
        (torch.arange(2), torch.arange(2).int(), TypeError, "counters must be torch.int64, got torch.int32"),
        (torch.arange(2), torch.arange(3), ValueError, "counters must have the seeds' shape [2], got [3]"),
    ],
)
def test_arguments_are_checked(seeds, counters, error, message):
    with pytest.raises(error, match=re.escape(message)):
        bytekernels.uniform(seeds, counters)
