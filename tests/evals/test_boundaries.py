"""Boundaries by distance from a space, against a count that walks byte by byte."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evals import boundaries
from evals.boundaries import FURTHEST, SPACE, Counts, count, distances, measure, router_ends
from evals.noise import antspeak
from models import ByteLM
from models.padding import pack_with_padding
from tests.models.conftest import small_model
from training.alignment import TokenBytes
from training.teacher import load_teacher

TEXTS = ["the function returns", "a value where\nits argument is given.", "日本語 👍🏽 x = 1"]


@given(st.text("ab \n\t", max_size=30))
def test_distances(text):
    data = text.encode()
    for place, distance in enumerate(distances(data)):
        following = data[place + 1 :]
        wanted = next((i for i, byte in enumerate(following) if SPACE[byte]), len(following))
        assert distance == wanted


@given(st.lists(st.tuples(st.sampled_from("abc \n"), st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_counts_are_of_every_byte_but_the_last(rows):
    text, tokenizer, router = "".join(row[0] for row in rows).encode(), *np.array([row[1:] for row in rows]).T
    found = count(text, tokenizer, router)
    wanted = [Counts() for _ in range(FURTHEST + 1)]
    for place, distance in enumerate(distances(text)[:-1]):
        one, two = bool(tokenizer[place]), bool(router[place])
        wanted[min(distance, FURTHEST)] += Counts(1, int(one), int(two), int(one and two))
    assert found == wanted


def test_rates():
    rates = Counts(num_bytes=20, tokenizer=8, router=5, both=4).rates()
    assert rates == pytest.approx(
        {
            "bytes": 20,
            "tokenizer's rate": 0.4,
            "router's rate": 0.25,
            "precision": 0.8,
            "recall": 0.5,
            "f1": 2 * 0.8 * 0.5 / 1.3,
        }
    )
    assert set(Counts().rates().values()) == {0}


def test_the_routers_ends_are_those_of_a_forward_pass(models):
    model = ByteLM.from_pretrained(models.student).eval()
    texts = [text.encode() for text in TEXTS]
    for text, ends in zip(texts, router_ends(model, texts), strict=True):
        with torch.no_grad():
            boundary = model(*pack_with_padding([text], "cpu")).routing.boundary
        assert ends.tolist() == boundary[1 : 1 + len(text)].tolist()
    with pytest.raises(ValueError, match="says where chunks start"):
        router_ends(small_model(lookahead=False), texts)


def test_a_tokenizer_as_router_is_right_everywhere(models, monkeypatch):
    tokens = TokenBytes(load_teacher(models.teacher)[1])

    def ends(_, texts):
        found = []
        for text in texts:
            (one,) = tokens.encode([text.decode()])
            found.append(np.isin(np.arange(len(text)), np.cumsum(one.lengths) - 1))
        return found

    monkeypatch.setattr(boundaries, "router_ends", ends)
    some = SimpleNamespace(encode=lambda texts: [None] if texts == ["normalised"] else tokens.encode(texts))
    counts, left_out = measure(None, some, [*TEXTS, "x", "", "normalised"], str)
    assert left_out == 1
    rates = sum(counts, Counts()).rates()
    assert rates["bytes"] == sum(len(text.encode()) - 1 for text in TEXTS)
    assert rates["precision"] == rates["recall"] == rates["f1"] == 1
    assert 0 < rates["tokenizer's rate"] == rates["router's rate"] < 1


def test_the_command(models, tmp_path, capsys):
    (tmp_path / "text.md").write_text("\n".join(TEXTS))
    given = [models.student, "--teacher", models.teacher, "--text", tmp_path / "text.md", "--device", "cpu"]
    given += ["--noises", "antspeak", "--json", tmp_path / "out.json"]
    assert boundaries.main([str(word) for word in given]) == 0
    assert "| antspeak |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())["by distance"]
    assert set(found) == {"clean", "antspeak"}
    for row in found.values():
        assert row["all"]["bytes"] == row["0"]["bytes"] + row["elsewhere"]["bytes"]
    assert found["antspeak"]["all"]["bytes"] == len(antspeak("\n".join(TEXTS), None).encode()) - 1
