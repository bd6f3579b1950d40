"""Questions come from the package's data as they stand there."""

import gzip
import itertools
import shutil

import pytest

from evals.questions import Question, Writing
from evals.tasks import CORE, data_folder, read_continuations, read_task, read_texts
from tests.evals.conftest import CHOICES, CLOZES, SUMS
from training.errors import UserError


def test_choices_without_the_requests_that_lack_their_question(data):
    questions = read_task(CORE["piqa"], data)
    assert questions == [
        Question("piqa", number, tuple((context, f" {choice}") for choice in choices), gold)
        for number, (context, choices, gold) in enumerate(CHOICES)
    ]


def test_clozes(data):
    assert read_task(CORE["lambada"], data) == [
        Question("lambada", number, ((context, f" {word}"),)) for number, (context, word) in enumerate(CLOZES)
    ]


def test_what_is_to_be_written(data):
    writing = Writing(("Question:", "\n\n"), 6)
    assert read_task(CORE["gsm8k"], data) == [
        Question("gsm8k", number, ((context, f" {text}"),), writing=writing, answer=answer)
        for number, (context, text, answer) in enumerate(SUMS)
    ]


def test_mmlu_asks_after_five_answered_questions_of_the_subject(data):
    questions = read_task(CORE["mmlu"], data)
    assert [question.number for question in questions] == [0, 1, 2, 3]
    context = questions[3].pairs[0][0]
    assert context.startswith(
        "The following are multiple choice questions (with answers) about world history.\n\n"
        "What of world_history is 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\nWhat of world_history is 1?"
    )
    assert context.count("Answer:") == 6 and context.endswith("is 1?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    assert questions[3].pairs == tuple((context, f" {letter}") for letter in "ABCD")
    assert questions[3].gold == 1


def test_a_larger_draw_holds_the_smaller_one(data):
    whole = read_task(CORE["piqa"], data)
    draws = [read_task(CORE["piqa"], data, limit=limit, seed=3) for limit in (1, 2, 4, 5, 9)]
    for smaller, larger in itertools.pairwise(draws):
        assert set(smaller) <= set(larger)
    assert [len(draw) for draw in draws] == [1, 2, 4, 5, 5]
    assert all(draw == sorted(draw, key=lambda question: question.number) for draw in draws)
    assert draws[-1] == whole
    others = {tuple(read_task(CORE["piqa"], data, limit=2, seed=seed)) for seed in range(10)}
    assert len(others) > 1


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("Ein schöner Text.\n")
    (question,) = read_texts([str(tmp_path / "*.txt")])
    assert question == Question("text", 0, (("", "Ein schöner Text.\n"),), is_text=True)


def test_data_that_is_missing_or_damaged(data, tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere"):
        data_folder(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"task arc_challenge: .* is missing; install the data anew \(make evals-data\)"
    ):
        read_task(CORE["arc_challenge"], data)
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / CORE["piqa"].path
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(UserError, match="task piqa: cannot read"):
        read_task(CORE["piqa"], tmp_path / "data")
    path.write_bytes(gzip.compress(whole + b"{}\n"))
    with pytest.raises(UserError, match=r"line 29: KeyError\('doc_id'\) where a request was expected"):
        read_task(CORE["piqa"], tmp_path / "data")
    shutil.rmtree(tmp_path / "data/hf_datasets/hails/mmlu_no_train/world_history/dev")
    with pytest.raises(UserError, match="dev holds no rows"):
        read_task(CORE["mmlu"], tmp_path / "data")


def test_continuations_begin_between_words(tmp_path):
    words = "Ein schöner Text, der lange weitergeht und nie\nendet. " * 20
    for name, text in (("a", words), ("b", words[:300]), ("c", words[7:])):
        (tmp_path / f"{name}.txt").write_text(text)
    questions = read_continuations([str(tmp_path / "*.txt")])
    assert [question.number for question in questions] == [0, 1]
    for question in questions:
        ((context, continuation),) = question.pairs
        assert 400 < len(context) < 450 and 100 < len(continuation) < 150
        assert words.find(context + continuation) in (0, 7)
        assert continuation[0].isspace() and not context[-1].isspace() and not continuation[-1].isspace()
    assert read_continuations([str(tmp_path / "*.txt")], limit=1)[0] in questions
    with pytest.raises(UserError, match="has 500 characters: give longer ones"):
        read_continuations([str(tmp_path / "b.txt")])
