"""How near states are to embeddings, against loops over tokens; and the command on a small model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bytekernels import BOS
from evals import alignment
from evals.alignment import Nearness, bands, measure, nearness
from models import ByteLM
from training.alignment import TokenBytes
from training.errors import UserError
from training.teacher import load_teacher
from training.text import is_held_out, read_documents

TEXTS = ["the function returns", "a value where\nits argument is given.", "日本語 👍🏽 x = 1"]


def test_the_nearest_of_all_embeddings():
    draw = torch.Generator().manual_seed(0)
    embeddings = torch.randn(50, 8, generator=draw)
    embeddings[7] = embeddings[3]  # two tokens with one embedding
    embeddings[9] *= 30  # a long one has the largest product with everything
    token_ids = torch.arange(50).repeat(3)
    states = embeddings[token_ids] + torch.randn(150, 8, generator=draw) * 0.9
    found = nearness(states, token_ids, embeddings)
    for i, token in enumerate(token_ids.tolist()):
        distance = (states[i].double() - embeddings.double()).square().sum(1)
        assert found.squared[i] == pytest.approx(float(distance[token]))
        assert found.nearest[i] == (distance.min() == distance[token])
        cosine = torch.dot(states[i], embeddings[token]) / states[i].norm() / embeddings[token].norm()
        assert found.cosine[i] == pytest.approx(float(cosine), abs=1e-6)
    assert 0.1 < found.nearest.mean() < 0.9 and found.nearest[token_ids == 7].any()


def test_every_token_is_held_against_its_own_embedding(models):
    teacher, tokenizer = load_teacher(models.teacher)
    tokens, model = TokenBytes(tokenizer), ByteLM.from_pretrained(models.student).eval()
    embeddings = teacher.get_input_embeddings().weight.detach()
    found, left_out = measure(model, embeddings, tokens, TEXTS)
    assert left_out == 0
    row = 0
    for text in TEXTS:
        ids = torch.tensor([BOS, *text.encode()], dtype=torch.uint8)
        h = model.encoder(ids, torch.tensor([0, len(ids)], dtype=torch.int32))
        (aligned,) = tokens.encode([text])
        for token, end in zip(aligned.ids, np.cumsum(aligned.lengths), strict=True):
            assert found.token_ids[row] == token
            squared = (h[end].double() - embeddings[token].double()).square().sum()
            assert found.squared[row] == pytest.approx(squared.item(), rel=1e-4)
            row += 1
    assert row == len(found.token_ids)


def test_bands_are_of_what_was_seen():
    token_ids = np.array([0, 0, 1, 2, 3, 3])
    found = Nearness(token_ids, np.arange(6) / 10, np.arange(6.0), np.array([1, 0, 1, 1, 0, 1], bool))
    rows = bands(found, np.array([0, 1, 9, 25_000]), variance=2.0)
    assert {name: row["occurrences"] for name, row in rows.items()} == {
        "all": 6, "never seen": 2, "seen 1 to 9 times": 2, "seen 10000 times or more": 2}  # fmt: skip
    assert rows["never seen"] == {
        "occurrences": 2, "tokens": 1, "cosine": 0.05, "squared error": 0.25, "nearest": 0.5}  # fmt: skip
    assert rows["all"]["nearest"] == pytest.approx(4 / 6) and rows["all"]["squared error"] == 1.25
    assert list(bands(found, None, 2.0)) == ["all"]


def test_held_out_documents_alone(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(400)))
    wanted = [document.text.decode() for document in read_documents([str(file)]) if is_held_out(document.source)]
    assert 0 < len(wanted) < 40
    assert list(alignment.beginnings([str(file)], 10**6, held_out=True)) == wanted
    assert list(alignment.beginnings([str(file)], 25)) == ["document 0", "document 1", "document 2"]


def test_what_is_held_out_was_not_seen(tokenizer_of_documents, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"the value {i}"}) + "\n" for i in range(400)))
    tokens = tokenizer_of_documents
    every, trained = (alignment.occurrences(tokens, [str(file)], trained_on=flag) for flag in (False, True))
    held_out = sum(
        len(tokens.encode([text])[0].ids) for text in alignment.beginnings([str(file)], 10**6, held_out=True)
    )
    assert every.sum() - trained.sum() == held_out > 0


def test_texts_that_are_all_left_out_are_told(models):
    tokens = SimpleNamespace(encode=lambda texts: [None] * len(texts))
    with pytest.raises(UserError, match="the bytes of no text: give other --text"):
        measure(ByteLM.from_pretrained(models.student).eval(), torch.zeros(1, 32), tokens, TEXTS)


@pytest.fixture
def tokenizer_of_documents(models):
    return TokenBytes(load_teacher(models.teacher)[1])


def test_the_command(models, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the function returns a value where its argument is given.\n" * 5)
    arguments = [str(models.student), "--teacher", str(models.teacher), "--text", str(tmp_path / "text.txt")]
    out = tmp_path / "alignment.json"
    assert alignment.main([*arguments, "--seen", str(tmp_path / "text.txt"), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["texts"] == 1 and report["bands"]["all"]["occurrences"] > 20
    assert sum(row["occurrences"] for row in report["bands"].values()) == 2 * report["bands"]["all"]["occurrences"]
    assert "nearest is right" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        alignment.main([str(tmp_path), *arguments[1:]])
    assert "config.json" in capsys.readouterr().err
