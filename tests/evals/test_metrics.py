"""Scores and their errors, against figures worked out by hand or by simulation."""

import math

import numpy as np
import pytest

from evals.metrics import Answer, Estimate, Metric, chance, last_number, mean_of, metrics_of, ratio
from evals.questions import Question, Writing
from models import ContinuationScore


def question(number: int, choices: int, gold: int = 0, **more) -> Question:
    return Question("task", number, tuple(("context", f" {i}") for i in range(choices)), gold, **more)


def answer(*scores: tuple[float, int], greedy: bool = False, text: str | None = None) -> Answer:
    return Answer(tuple(ContinuationScore(ll, size, greedy) for ll, size in scores), text)


def test_choices():
    questions = [question(0, 2), question(1, 3, 2), question(2, 2, 1)]
    answers = [
        answer((-1.0, 1), (-2.0, 8)),  # right; not by bytes, where the second is likelier
        answer((-9.0, 3), (-8.0, 2), (-8.0, 8)),  # a tie goes to the first; by bytes the last one
        answer((-4.0, 2), (-3.0, 1)),  # right; by bytes the first
    ]
    found = metrics_of(questions, answers)
    assert found["accuracy"].values.tolist() == [1, 0, 1]
    assert found["accuracy per byte"].values.tolist() == [0, 1, 0]
    bits = (1 + 8 + 3) / math.log(2)
    assert found["bits per byte"].estimate().value == pytest.approx(bits / (1 + 8 + 1))
    assert set(found) == {"accuracy", "accuracy per byte", "bits per byte"}
    assert chance(questions) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)


def test_clozes_are_right_where_they_would_be_written():
    questions = [question(0, 1), question(1, 1)]
    found = metrics_of(questions, [answer((-2.0, 4), greedy=True), answer((-4.0, 8))])
    assert found["accuracy"].values.tolist() == [1, 0]
    assert found["bits"].estimate().value == pytest.approx(3 / math.log(2))
    assert found["bits per byte"].estimate().value == pytest.approx(0.5 / math.log(2))
    assert "accuracy per byte" not in found and "exact answer" not in found
    assert chance(questions) == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So the answer is 18.", 18.0),
        ("1,234 and -5", -5.0),
        ("It costs $1,234.50", 1234.5),
        ("3.", 3.0),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


def test_what_is_written_is_judged_by_its_last_number():
    writing = Writing(("\n",), 10)
    questions = [question(i, 1, writing=writing, answer=number) for i, number in enumerate(("18", "1,000", "7"))]
    texts = [" 9 * 2 = 18 dollars.", " so 1000", " I do not know"]
    found = metrics_of(questions, [answer((-1.0, 1), text=text) for text in texts])
    assert found["exact answer"].values.tolist() == [1, 1, 0]
    not_written = [answer((-1.0, 1), text=text) for text in (*texts[:2], None)]
    assert "exact answer" not in metrics_of(questions, not_written)


def test_the_error_of_a_mean_is_the_usual_one():
    values = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    estimate = Metric(values, np.ones(5)).estimate()
    assert estimate == pytest.approx((0.6, values.std(ddof=1) / math.sqrt(5)))
    assert math.isnan(Metric(values[:1], np.ones(1)).estimate().error)
    assert math.isnan(Metric(values[:0], values[:0]).estimate().value)


def draws(rng: np.random.Generator, n: int = 400) -> tuple[Metric, Metric]:
    """Two models' scores of the same questions, which are hard or easy for both, and ratios of sums."""
    ease, weights = rng.random(n), rng.integers(1, 9, n).astype(float)
    return tuple(Metric((rng.random(n) < ease * skill) * weights, weights) for skill in (0.7, 0.9))


@pytest.mark.parametrize("what", ["score", "ratio"])
def test_errors_are_those_of_repeated_draws(what):
    rng = np.random.default_rng(0)
    found = [ratio(*draws(rng)) if what == "ratio" else draws(rng)[0].estimate() for _ in range(1500)]
    values, errors = (np.array(column) for column in zip(*found, strict=True))
    assert errors.mean() == pytest.approx(values.std(), rel=0.06)
    assert values.mean() == pytest.approx(0.7 / 0.9 if what == "ratio" else 0.35, abs=0.005)


def test_a_ratio_over_nothing_is_none():
    zero, one = Metric(np.zeros(3), np.ones(3)), Metric(np.ones(3), np.ones(3))
    assert math.isnan(ratio(one, zero).value)
    assert ratio(one, one) == Estimate(1.0, 0.0)


def test_the_mean_of_estimates():
    assert mean_of([Estimate(1.0, 0.3), Estimate(2.0, 0.4)]) == pytest.approx((1.5, 0.25))
    assert math.isnan(mean_of([]).value)
