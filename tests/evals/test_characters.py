"""Character-level tasks: answers recomputed from the prompts' words, choices of one length, chance as it is said."""

import re
from collections import Counter
from pathlib import Path

import pytest

from evals.characters import COUNTED, EXAMPLES, LETTERS, PROBLEMS, TASKS, WORDS, questions
from training.errors import UserError

every_task = pytest.mark.parametrize("task", PROBLEMS)
MANY = 400


def solved(question: str) -> tuple[str, str]:
    """The word that a question is about, and its answer, from what the question says alone."""
    if spelled := re.fullmatch(r'Which word is spelled "(.+)"\?', question):
        word = spelled[1].replace(" ", "")
        return word, word
    if asked := re.fullmatch(r'How many times does the letter "(.)" occur in "(\w+)"\?', question):
        return asked[2], str(sum(letter == asked[1] for letter in asked[2]))
    if asked := re.fullmatch(r'Spell "(\w+)" with a space between the letters\.', question):
        return asked[1], re.sub(r"(?<=.)(?=.)", " ", asked[1])
    if asked := re.fullmatch(r'Write "(\w+)" backwards\.', question):
        return asked[1], "".join(reversed(asked[1]))
    asked = re.fullmatch(r'Write "(\w+)" with "(.)" after every "(.)"\.', question)
    assert asked[2] not in asked[1] and asked[3] in asked[1]
    return asked[1], asked[1].replace(asked[3], asked[3] + asked[2])


def parsed(context: str) -> tuple[list[tuple[str, str]], str]:
    """(question, answer) of the examples, and the last question."""
    *examples, asked = context.split("\n\n")
    return (
        [re.fullmatch(r"Question: (.+)\nAnswer: (.+)", example).groups() for example in examples],
        re.fullmatch(r"Question: (.+)\nAnswer:", asked)[1],
    )


@every_task
def test_answers_are_right_and_examples_are_about_other_words(task):
    for question in questions(task, MANY, seed=1):
        assert len({context for context, _ in question.pairs}) == 1
        examples, asked = parsed(question.pairs[0][0])
        assert len(examples) == EXAMPLES
        assert all(solved(example)[1] == answer for example, answer in examples)
        word, answer = solved(asked)
        words = [word, *(solved(example)[0] for example, _ in examples)]
        assert len(set(words)) == len(words) and set(words) <= set(WORDS)
        assert question.is_choice and question.pairs[question.gold][1] == f" {answer}"


@every_task
def test_choices_are_four_different_ones_of_one_length(task):
    for question in questions(task, MANY, seed=2):
        choices = [continuation for _, continuation in question.pairs]
        assert len(set(choices)) == 4 and len(set(map(len, choices))) == 1
        assert all(re.fullmatch(r" [a-z0-3](.*\S)?", choice) for choice in choices)


@every_task
def test_the_right_one_stands_anywhere(task):
    golds = Counter(question.gold for question in questions(task, MANY, seed=3))
    assert all(abs(golds[place] - MANY / 4) < 4 * (MANY * 3 / 16) ** 0.5 for place in range(4))


@every_task
def test_a_cloze_asks_what_the_choice_asks(task):
    for choice, cloze in zip(questions(task, 20, seed=4), questions(f"{task}_exact", 20, seed=4), strict=True):
        context, answer = choice.pairs[choice.gold]
        assert cloze.pairs == ((context, f"{answer}\n"),) and cloze.gold == 0 and not cloze.is_choice
        assert (cloze.task, cloze.number) == (f"{task}_exact", choice.number)


@pytest.mark.parametrize("task", TASKS)
def test_a_question_depends_on_its_task_its_seed_and_its_number(task):
    few, many = questions(task, 3, seed=5), questions(task, 8, seed=5)
    assert many[:3] == few and [question.number for question in many] == list(range(8))
    assert len({question.pairs for question in many}) == 8
    assert all(ours != other for ours, other in zip(many, questions(task, 8, seed=6), strict=True))
    assert questions(task, 0, seed=5) == []


def test_a_letter_says_nothing_about_its_count():
    answers = {letter: Counter() for letter in COUNTED}
    for question in questions("count", 10 * MANY, seed=7):
        letter = re.findall(r'the letter "(.)"', question.pairs[0][0])[-1]
        answers[letter][question.pairs[question.gold][1]] += 1
    for counts in answers.values():
        asked = sum(counts.values())
        assert all(abs(counts[f" {times}"] - asked / 4) < 4 * (asked * 3 / 16) ** 0.5 for times in range(4))


def test_there_are_words_enough():
    for letter in COUNTED:
        for times in range(4):
            assert sum(word.count(letter) == times for word in WORDS) > EXAMPLES
    assert len(set(WORDS)) == len(WORDS) and set("".join(WORDS)) == set(LETTERS)
    assert all(re.fullmatch("[a-z]{5,10}", word) and word != word[::-1] for word in WORDS)


def test_wrong_answers_are_near():
    question = questions("reverse", 1, seed=0)[0]
    word, _ = solved(parsed(question.pairs[0][0])[1])
    assert f" {word}" in [continuation for _, continuation in question.pairs]
    for question in questions("insert", MANY, seed=8):
        letters = {frozenset(Counter(continuation).items()) for _, continuation in question.pairs}
        assert len(letters) == 1
    for task in ("spell", "unspell"):
        for question in questions(task, MANY, seed=9):
            answer = question.pairs[question.gold][1]
            for _, wrong in question.pairs:
                assert sum(ours != right for ours, right in zip(wrong, answer, strict=True)) <= 2


def test_the_page_shows_the_first_questions():
    page = (Path(__file__).parents[2] / "docs" / "robustness.md").read_text(encoding="utf-8")
    rows = []
    for task in PROBLEMS:
        question = questions(task, 1, seed=0)[0]
        choices = [f"`{continuation.removeprefix(' ')}`" for _, continuation in question.pairs]
        asked = parsed(question.pairs[0][0])[1]
        rows.append(f"| `{task}` | {asked} | {', '.join(choices)} | {choices[question.gold]} |")
    assert "\n".join(rows) in page
    assert int(re.search(r"(\d+)\s+English\s+words", page)[1]) == len(WORDS)
    assert all(f"`{task}`" in page for task in TASKS)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="task 'speling' is not known; there are spell, .*insert_exact"):
        questions("speling", 1, seed=0)
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        questions("spell", -1, seed=0)
