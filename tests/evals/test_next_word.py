"""Next words: which texts count, and the command."""

import json
from types import SimpleNamespace

import pytest

from evals import next_word
from evals.questions import Question


@pytest.mark.parametrize("mode", ["joint", "multibyte"])
def test_a_word_is_right_where_it_is_written(mode, monkeypatch):
    texts = {  # context: (what is written, what follows there)
        "a": (" given. And more", " given. But"),
        "b": (" givenness", " given to"),
        "b2": (" givenness", "  given to"),
        "f": ("\n\n      it is", "\n\n      it was"),
        "g": (" it. Longer", " it."),
        "c": ("\nüber alles", "  über uns"),
        "d": ("", " it"),
        "e": (" it", " it"),
    }
    asked = []

    def write(_, contexts, *, max_new_bytes, mode):
        asked.append((len(contexts), mode))
        whole = (texts[context][0].encode()[:max_new_bytes] for context in contexts)
        return [SimpleNamespace(new=text) for text in whole]

    monkeypatch.setattr(next_word, "generate", write)
    monkeypatch.setattr(next_word, "AT_ONCE", 2)
    questions = [Question("continuation", i, ((c, text),)) for i, (c, (_, text)) in enumerate(texts.items())]
    value, error = next_word.next_words(None, questions, mode)
    assert value == pytest.approx(5 / 8)
    assert error > 0
    assert asked == [(2, mode)] * 4


def test_the_command(models, tmp_path, capsys):
    (tmp_path / "text.md").write_text("The function returns a value where its argument is given.\n" * 20)
    given = [models.student, "--text", tmp_path / "text.md", "--device", "cpu", "--json", tmp_path / "out.json"]
    assert next_word.main([str(word) for word in given]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["places"] == 1 and set(found["next words"]) == {"joint"}
    assert "| joint |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        next_word.main([str(word) for word in [*given, "--limit", "0"]])
