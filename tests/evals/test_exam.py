"""Answers: the scorer's own, whatever the batches, kept line by line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from evals.exam import Sheet, ask
from evals.examinee import examinee
from evals.metrics import Answer
from evals.questions import Question, Writing
from evals.tasks import CORE, read_task
from models import ByteLM, ContinuationScore, Scorer, TokenHeadWriter, generate
from training.alignment import TokenBytes
from training.errors import UserError
from training.teacher import load_teacher
from training.vocabulary import vocabulary_of

CPU = torch.device("cpu")
QUESTION = Question("piqa", 3, (("a", " b"), ("a", " c")))
ANSWER = Answer((ContinuationScore(-1.25, 2, True), ContinuationScore(-3.5, 2, False)), "text\n")


def asked(path: Path, questions, who) -> list[Answer]:
    sheet = Sheet(path, {})
    ask(who, questions, sheet, "", bar=False)
    sheet.close()
    return [sheet[question] for question in questions]


def every_question(data) -> list[Question]:
    """Of four kinds, with numbers of their own."""
    found = [q for name in ("piqa", "lambada", "gsm8k", "mmlu") for q in read_task(CORE[name], data)]
    found.append(Question("text", 0, (("", "The function returns a value.\n" * 3),), is_text=True))
    return [replace(question, number=i) for i, question in enumerate(found)]


def seats(models) -> dict[str, dict]:
    return {
        "student": {"model": models.student},
        "stage 1": {"model": models.stage_1, "teacher": models.teacher},
        "teacher": {"model": None, "teacher": models.teacher},
    }


@pytest.mark.parametrize("who", ["student", "stage 1", "teacher"])
def test_answers_do_not_depend_on_batches(models, data, tmp_path, who):
    questions = every_question(data)
    found = [
        asked(tmp_path / str(size), questions, examinee(**seats(models)[who], device=CPU, batch_bytes=size))
        for size in (1, 300, 65536)
    ]
    one_by_one = examinee(**seats(models)[who], device=CPU)
    found.append([asked(tmp_path / f"one-{q.number}", [q], one_by_one)[0] for q in questions])
    for other in found[1:]:
        for question, one, two in zip(questions, found[0], other, strict=True):
            assert one.text == two.text
            assert (one.text is not None) == (question.writing is not None)
            for a, b in zip(one.scores, two.scores, strict=True):
                assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-6)
                assert (a.num_bytes, a.is_greedy) == (b.num_bytes, b.is_greedy)


def test_a_students_answers_are_the_scorers_and_the_writers(models, data, tmp_path):
    who = examinee(models.student, device=CPU)
    questions = every_question(data)
    answers = asked(tmp_path / "sheet", questions, who)
    for question, answer in zip(questions, answers, strict=True):
        if not question.is_text:
            for pair, score in zip(question.pairs, answer.scores, strict=True):
                assert score.log_likelihood == pytest.approx(
                    Scorer(who.model).score([pair])[0].log_likelihood, rel=1e-6
                )
        if question.writing is not None:
            wanted = generate(who.model, question.pairs[0][0], max_new_bytes=24, stop=question.writing.stop).new_text
            assert answer.text == wanted


def test_a_teachers_answers_are_those_of_plain_transformers(models, data, tmp_path):
    """Each continuation by itself, by the model as it is loaded, without anything of ours."""
    questions = [question for question in every_question(data) if not question.is_text]
    answers = asked(tmp_path / "sheet", questions, examinee(None, models.teacher, device=CPU))
    model, tokenizer = load_teacher(models.teacher)
    for question, answer in zip(questions, answers, strict=True):
        for (context, continuation), score in zip(question.pairs, answer.scores, strict=True):
            ids = tokenizer(context + continuation)["input_ids"]
            given = len(tokenizer(context)["input_ids"])
            assert ids[:given] == tokenizer(context)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0, :-1]
            log_probs = F.log_softmax(logits.double(), -1)[given:]
            wanted = log_probs.gather(1, torch.tensor(ids[given:])[:, None]).sum()
            assert score.log_likelihood == pytest.approx(float(wanted), rel=1e-5)
            assert score.num_bytes == len(continuation.encode())
            assert score.is_greedy == (log_probs.argmax(1).tolist() == ids[given:])
        if question.writing is not None:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(question.pairs[0][0])["input_ids"]]])
            for _ in range(question.writing.max_tokens):
                with torch.no_grad():
                    best = model(ids).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, best], 1)
                if best.item() == tokenizer.eos_token_id:
                    break
            new = tokenizer.decode(
                ids[0, 1 + len(tokenizer(question.pairs[0][0])["input_ids"]) :], skip_special_tokens=True
            )
            for stop in question.writing.stop:
                new = new.split(stop)[0]
            assert answer.text == new


def test_a_stop_string_ends_what_a_teacher_writes(models):
    who = examinee(None, models.teacher, device=CPU)
    (free,) = who.write(["the function"], max_tokens=12, stop=())
    stop = free[len(free) // 2 : len(free) // 2 + 2]
    assert who.write(["the function"], max_tokens=12, stop=[stop]) == [free.split(stop)[0]]


def test_only_what_is_missing_is_asked(models, data, tmp_path, monkeypatch):
    questions = read_task(CORE["piqa"], data)
    who = examinee(models.student, device=CPU)
    first = asked(tmp_path / "sheet", questions[:2], who)
    pairs = []
    score = who.scorer.score
    monkeypatch.setattr(who.scorer, "score", lambda given: pairs.extend(given) or score(given))
    again = asked(tmp_path / "sheet", questions, who)
    assert again[:2] == first
    assert sorted(pairs) == sorted(pair for question in questions[2:] for pair in question.pairs)


def test_a_question_that_cannot_be_scored_is_named(models, data, tmp_path):
    questions = read_task(CORE["piqa"], data)
    questions[1] = Question("piqa", 1, (("a context", ""), ("a context", "x")))
    with pytest.raises(UserError, match="task piqa, question 1: the continuation is empty"):
        asked(tmp_path / "sheet", questions, examinee(models.student, device=CPU))


def test_a_model_of_stage_1_writes_with_its_token_head(models):
    who = examinee(models.stage_1, models.teacher, device=CPU, truncate=True)
    tokens = TokenBytes(load_teacher(models.teacher)[1])
    writer = TokenHeadWriter(ByteLM.from_pretrained(models.stage_1).eval(), vocabulary_of(tokens), tokens.encode)
    (expected,) = writer.write(["the function returns"], max_new_bytes=12)
    assert who.write(["the function returns"], max_tokens=3, stop=()) == [expected.new_text]
    positions = who.scorer.positions
    (short,) = who.write(["the function returns a value " * positions], max_tokens=3, stop=())
    assert len(short.encode()) <= 12
    strict = examinee(models.stage_1, models.teacher, device=CPU)
    with pytest.raises(ValueError, match=f"tokens leave no room for 3 in {positions} positions"):
        strict.write(["the function returns a value " * positions], max_tokens=3, stop=())


def test_nobody_to_examine_and_beams_over_tokens():
    with pytest.raises(UserError, match="no model is given"):
        examinee(None, device=CPU)
    with pytest.raises(UserError, match="beam=2: with teacher=x bits play no part"):
        examinee(None, "x", device=CPU, beam=2)


def test_a_sheet_keeps_answers_exactly(tmp_path):
    sheet = Sheet(tmp_path / "a" / "sheet", {"model": "m"})
    assert QUESTION not in sheet
    sheet.add(QUESTION, ANSWER)
    assert Sheet(tmp_path / "a" / "sheet", {"model": "m"})[QUESTION] == ANSWER  # while the other is still open
    sheet.close()


def test_half_a_line_is_no_answer(tmp_path):
    path = tmp_path / "sheet"
    sheet = Sheet(path, {})
    sheet.add(QUESTION, ANSWER)
    sheet.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = Sheet(path, {})
        assert QUESTION not in again
        again.add(QUESTION, ANSWER)
        again.close()
        assert path.read_bytes() == whole


def test_answers_of_another_model_are_not_mixed_in(tmp_path):
    Sheet(tmp_path / "sheet", {"model": "m", "dtype": "float32"}).close()
    with pytest.raises(UserError, match="got otherwise \\(dtype: 'float32' then, 'bfloat16' now\\): .*--overwrite"):
        Sheet(tmp_path / "sheet", {"model": "m", "dtype": "bfloat16"})


def test_an_answer_to_another_text_is_no_answer(tmp_path):
    sheet = Sheet(tmp_path / "sheet", {})
    sheet.add(QUESTION, ANSWER)
    sheet.close()
    changed = [
        replace(QUESTION, pairs=(("a", " b"), ("a", " d"))),
        replace(QUESTION, number=4),
        replace(QUESTION, is_text=True),
        replace(QUESTION, writing=Writing(("x",), 3)),
        QUESTION.with_texts(str.upper),
    ]
    again = Sheet(tmp_path / "sheet", {})
    assert QUESTION in again
    assert not any(question in again for question in changed)
    assert len({question.digest for question in [QUESTION, *changed]}) == 5  # the number is not of the text
    assert replace(QUESTION, gold=1) in again  # which is judged anew
    again.close()


def test_a_score_that_is_not_finite_is_an_error(models, data, tmp_path, monkeypatch):
    who = examinee(models.student, device=CPU)
    nan = ContinuationScore(float("nan"), 3, False)
    monkeypatch.setattr(who.scorer, "score", lambda pairs: [nan] * len(pairs))
    with pytest.raises(UserError, match="task piqa, question .: the model's score is not finite"):
        asked(tmp_path / "sheet", read_task(CORE["piqa"], data), who)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_prompt_that_is_too_long_loses_its_beginning(models, who):
    seat = seats(models)[who]
    cut, refusing = (examinee(**seat, device=CPU, truncate=truncate) for truncate in (True, False))
    for one in (cut, refusing):
        one.scorer.positions = 60
    prompt = "where the function returns a value " * 20
    (text,) = cut.write([prompt], max_tokens=6, stop=())
    assert text
    if who == "teacher":  # 60 positions: BOS, 53 tokens, six that are written
        tokens = cut.tokenizer(prompt)["input_ids"]
        (wanted,) = refusing.write([cut.tokenizer.decode(tokens[-53:])], max_tokens=6, stop=())
        assert text == wanted
    with pytest.raises(ValueError, match="positions"):
        refusing.write([prompt], max_tokens=6, stop=())


def test_a_word_that_goes_on_is_not_written(models, tmp_path, monkeypatch):
    who = examinee(models.student, device=CPU)
    clozes = [Question("lambada", i, ((f"c{i}", text),)) for i, text in enumerate((" sign", " sign", " sign", " it\n"))]
    greedy = ContinuationScore(-1.0, 5, True)
    monkeypatch.setattr(who.scorer, "score", lambda pairs: [greedy] * len(pairs))
    following = {"c0 sign": "s of", "c1 sign": ", so", "c2 sign": ""}
    monkeypatch.setattr(type(who), "write", lambda self, prompts, **_: [following[prompt] for prompt in prompts])
    answers = asked(tmp_path / "sheet", clozes, who)
    assert [answer.scores[0].is_greedy for answer in answers] == [False, True, True, True]


def test_a_damaged_sheet_is_named(tmp_path):
    path = tmp_path / "sheet"
    Sheet(path, {}).close()
    path.write_text(path.read_text() + json.dumps({"number": 1, "asked": "x"}) + "\n")
    with pytest.raises(UserError, match="sheet is damaged .*: remove it, or give --overwrite"):
        Sheet(path, {})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/sheet"):
        Sheet(tmp_path / "file" / "sheet", {})
