"""The training-free baseline: the teacher's own states at its tokens' ends, a folder that loads, prompts that go on."""

import numpy as np
import pytest
import torch

from bytekernels import pack_bytes
from models import ByteLM
from models.core import run_packed
from training import baseline
from training.alignment import TokenBytes
from training.vocabulary import vocabulary_of


@torch.no_grad()
def test_where_strings_are_tokens_it_is_the_teacher(teacher, tokenizer):
    tokens = TokenBytes(tokenizer)
    model = baseline.baseline(teacher, vocabulary_of(tokens))
    text = "the function returns a value"
    (found,) = tokens.encode([text])
    ids, cu_seqlens = pack_bytes([text.encode()])
    ends = torch.zeros(len(ids), dtype=torch.bool)
    ends[np.concatenate([[0], np.cumsum(found.lengths)])] = True
    hidden = model.token_hidden(model.encoder(ids, cu_seqlens), ids, ends, cu_seqlens)
    token_ids = torch.tensor([tokens.bos_id, *found.ids.tolist()])
    embeddings = teacher.get_input_embeddings()(token_ids)
    expected = run_packed(teacher.base_model, embeddings, torch.tensor([0, len(token_ids)], dtype=torch.int32))
    torch.testing.assert_close(hidden, expected)


def test_the_command(teacher, tokenizer, tmp_path, capsys):
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "baseline"
    arguments = ["--teacher", str(folder), "--out", str(out)]
    assert baseline.main([*arguments, "--prompt", "the function", "a value", "--max-new-bytes", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].replace("|", "").startswith("the function") and lines[1].replace("|", "").startswith("a value")
    assert lines[-1].endswith("--by-tokens")
    assert ByteLM.from_pretrained(out).encoder.suffix.strings()[: len(tokenizer)] == list(
        vocabulary_of(TokenBytes(tokenizer)).strings
    )
    with pytest.raises(SystemExit):
        baseline.main(["--teacher", str(tmp_path / "nothing"), "--out", str(out)])
    assert "nothing" in capsys.readouterr().err
