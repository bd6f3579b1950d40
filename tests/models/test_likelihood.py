"""Scores are probabilities: they agree with decoding and never exceed the sum over all paths."""

import math

import pytest
import torch

from models import score, token_score
from models.core import run_packed, use_packed
from tests.models.conftest import packed_bytes, small_model, small_teacher


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
    embeddings, head = teacher.get_input_embeddings()(tokens), teacher.get_output_embeddings().weight
    hidden = run_packed(use_packed(teacher).base_model, embeddings, token_cu)
    found = token_score(hidden, head, tokens, token_cu, torch.tensor([20, 30]))
    assert found.log_likelihood.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.bits_per_byte() == pytest.approx(-sum(expected) / math.log(2) / 50, abs=1e-5)
