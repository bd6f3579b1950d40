"""Scores are probabilities: they agree with decoding and never exceed the sum over all paths."""

import itertools
import math

import pytest
import torch

from bytekernels import BOS
from bytekernels.testing import ragged
from models import score, token_score
from models.core import use_packed
from tests.models.conftest import packed_bytes, small_model, small_teacher


def step_log_prob(model, ids: torch.Tensor, boundary: torch.Tensor) -> float:
    """Product of the decoding steps' own probabilities along a path, the last byte's bit summed out."""
    state, total = model.empty_state(1), 0.0
    for t in range(len(ids) - 1):
        log_probs = torch.log_softmax(model.step(ids[t : t + 1], boundary[t : t + 1], state)[0].double(), dim=-1)
        byte = int(ids[t + 1])
        if t + 2 == len(ids):
            total += float(log_probs[[byte, byte + 256]].logsumexp(0))
        else:
            total += float(log_probs[byte + 256 * int(boundary[t + 1])])
    return total


def test_score_is_the_product_of_the_steps(model):
    lengths = [12, 2, 1, 20]
    ids, cu_seqlens = packed_bytes(lengths)
    boundary = model(ids, cu_seqlens).routing.boundary
    found = score(model, ids, cu_seqlens)
    for s, length in enumerate(lengths):
        rows = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        assert found.log_likelihood[s] == pytest.approx(step_log_prob(model, ids[rows], boundary[rows]), abs=1e-4)
        assert found.bytes[s] == length - 1


@pytest.mark.parametrize("length", [2, 6, 9])
def test_one_path_bounds_the_sum_over_all(model, length, record_property):
    string = packed_bytes([length], seed=length)[0]
    paths = list(itertools.product([False, True], repeat=length - 2))  # BOS's bit is set, the last one summed out
    boundary = torch.tensor([[True, *path, True] for path in paths])
    cu_seqlens, _ = ragged([length] * len(paths))
    every = score(model, string.repeat(len(paths)), cu_seqlens, boundary.flatten()).log_likelihood
    exact = float(every.logsumexp(0))
    bound = float(score(model, string, ragged([length])[0]).log_likelihood[0])
    gap = (exact - bound) / math.log(2) / (length - 1)
    record_property("gap_bits_per_byte", gap)
    assert bound <= exact + 1e-6
    assert bound >= float(every.min()) - 1e-4 and any(abs(bound - float(one)) < 1e-4 for one in every)


def test_probabilities_of_two_byte_strings_sum_to_one():
    model = small_model()
    one = torch.tensor([[BOS, byte] for byte in range(256)], dtype=torch.uint8)
    cu_seqlens, _ = ragged([2] * 256)
    total = score(model, one.flatten(), cu_seqlens).log_likelihood.logsumexp(0)
    assert float(total) == pytest.approx(0.0, abs=1e-5)


def test_a_leaking_model_has_no_likelihood():
    ids, cu_seqlens = packed_bytes([6])
    with pytest.raises(ValueError, match="train with dechunk='hold' or 'causal'"):
        score(small_model(dechunk="lookahead"), ids, cu_seqlens)


def test_token_score_is_the_teachers_own_cross_entropy():
    teacher = small_teacher()
    tokens = torch.randint(0, 50, (17,), generator=torch.Generator().manual_seed(0))
    token_cu = torch.tensor([0, 6, 17], dtype=torch.int32)
    expected = [
        -teacher(input_ids=part[None], labels=part[None]).loss.item() * (len(part) - 1)
        for part in tokens.split([6, 11])
    ]
    embeddings = teacher.get_input_embeddings()(tokens)
    head = teacher.get_output_embeddings().weight
    found = token_score(use_packed(teacher).base_model, head, embeddings, tokens, token_cu, torch.tensor([20, 30]))
    assert found.log_likelihood.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.bits_per_byte() == pytest.approx(-sum(expected) / math.log(2) / 50, abs=1e-5)
