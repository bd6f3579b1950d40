"""What chunks cost along each path: their sums are the scores, and chunks that are no strings are told apart."""

import json
import math

import numpy as np
import pytest
import torch

from evals import chunk_cost
from evals.chunk_cost import Cost, cost, measure
from models import ByteLM, ByteLMConfig, Scorer
from models.byte_lm import core_settings
from tests.models.conftest import small_model
from training.alignment import TokenBytes
from training.errors import UserError
from training.teacher import load_teacher
from training.vocabulary import vocabulary_of

TEXTS = ["the function returns", "a value where\nits argument is given.", "日本語 👍🏽 x = 1"]


@pytest.fixture(scope="module")
def featured(models, tmp_path_factory):
    """A folder with a model that holds its teacher's vocabulary."""
    teacher, tokenizer = load_teacher(models.teacher)
    vocabulary = vocabulary_of(TokenBytes(tokenizer))
    sizes = dict(width=24, encoder_layers=1, decoder_layers=1, state_size=8, head_dim=12, bridge_inner=40)
    config = ByteLMConfig(
        core=core_settings(teacher), router_inner=20, suffix_bytes=vocabulary.num_bytes, marginal_head=True, **sizes
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("featured")
    ByteLM.from_teacher(teacher, config, vocabulary).save_pretrained(folder)
    return folder


def test_chunks_by_whether_they_are_strings():
    bits = np.array([1.0, 2, 4, 8, 16, 32])
    ends = np.array([False, True, False, True, False, False])
    found = cost(b"abcabx", ends, bits, frozenset([b"ab", b"bx"]))
    assert found == (Cost(2, 4, 51.0), Cost(1, 2, 12.0))
    assert cost(b"ab", np.array([False, True]), bits[:2], frozenset([b"ab"])) == (Cost(1, 2, 3.0), Cost())


def test_costs_are_the_scores(models, featured):
    model = ByteLM.from_pretrained(featured).eval()
    tokens = TokenBytes(load_teacher(models.teacher)[1])
    found, left_out = measure(model, tokens, [*TEXTS, ""])
    assert left_out == 0 and list(found) == ["router", "held to the vocabulary", "tokenizer"]
    sums = {name: strings + others for name, (strings, others) in found.items()}
    assert {each.num_bytes for each in sums.values()} == {sum(len(text.encode()) for text in TEXTS)}
    for name, constrained in (("router", False), ("held to the vocabulary", True)):
        model.config.constrain_chunks = constrained
        scores = Scorer(model).score([("", text) for text in TEXTS])
        assert sums[name].bits == pytest.approx(-sum(s.log_likelihood for s in scores) / math.log(2), rel=1e-5)
        assert measure(model, tokens, TEXTS)[0] == found  # whichever the model itself goes by
    assert sums["router"].bits != sums["held to the vocabulary"].bits
    assert found["tokenizer"][1] == Cost()
    assert sums["tokenizer"].chunks == sum(len(one.ids) for one in tokens.encode(TEXTS))
    assert found["router"][1].chunks > found["held to the vocabulary"][1].chunks


def test_what_it_refuses(models, featured):
    tokens = TokenBytes(load_teacher(models.teacher)[1])
    with pytest.raises(ValueError, match="needs suffix features and lookahead=True"):
        measure(small_model(), tokens, TEXTS)
    with pytest.raises(UserError, match="the bytes of no text"):
        measure(ByteLM.from_pretrained(featured).eval(), tokens, [""])


def test_the_command(models, featured, tmp_path, capsys):
    (tmp_path / "text.md").write_text("\n".join(TEXTS))
    given = [featured, "--teacher", models.teacher, "--text", tmp_path / "text.md", "--device", "cpu"]
    assert chunk_cost.main([str(word) for word in [*given, "--json", tmp_path / "out.json"]]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["documents"] == 1
    for name in ("router", "held to the vocabulary", "tokenizer"):
        both = found[name]["strings"], found[name]["others"]
        bits, size = (sum(one[key] for one in both) for key in ("bits", "num_bytes"))
        assert f"| {name} | {bits / size:.4f} |" in printed
    with pytest.raises(SystemExit):
        chunk_cost.main([str(models.stage_1), *map(str, given[1:])])
    assert "needs suffix features" in capsys.readouterr().err
