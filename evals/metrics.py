"""What answers are worth: scores with standard errors, and retention, the student's score over the teacher's."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evals.questions import Question
from models import ContinuationScore


@dataclass(frozen=True)
class Answer:
    """What a model made of a question.

    Attributes:
        scores: of each pair, in order.
        text: what it wrote; None where nothing is asked for.
    """

    scores: tuple[ContinuationScore, ...]
    text: str | None = None


class Estimate(NamedTuple):
    """A mean over questions and its standard error.

    Attributes:
        value: NaN without questions.
        error: NaN with fewer than two.
    """

    value: float
    error: float

    def plain(self) -> list[float | None]:
        """Both for JSON, which has no NaN."""
        return [None if math.isnan(number) else number for number in self]


class Metric(NamedTuple):
    """A ratio of sums over questions: a mean where all weights are 1.

    Attributes:
        values: float64 [n].
        weights: float64 [n].
    """

    values: np.ndarray
    weights: np.ndarray

    def estimate(self) -> Estimate:
        """``sum values / sum weights``; its standard error is that of a ratio of means (the delta method)."""
        if not len(self.values):
            return Estimate(math.nan, math.nan)
        ratio = self.values.sum() / self.weights.sum()
        return Estimate(float(ratio), _error((self.values - ratio * self.weights) / self.weights.mean()))


def metrics_of(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, Metric]:
    """The metrics of a task, by name; each has an item for each question.

    - ``accuracy``: the likeliest choice is the right one; of a cloze, greedy decoding writes it.
    - ``accuracy per byte``: the same of log-likelihoods over the choices' bytes (choices only).
    - ``bits per byte``: ``-log2 P`` of the right continuation over its bytes, both summed over questions.
    - ``bits``: the same of each continuation, not divided (clozes only).
    - ``exact answer``: the last number in the text that was written is the right one (where all texts were written).
    """
    gold = [answer.scores[question.gold] for question, answer in zip(questions, answers, strict=True)]
    bits = np.array([-score.log_likelihood / math.log(2) for score in gold])
    choice = all(question.is_choice for question in questions)
    found = {"accuracy": _mean([_is_right(q, a) for q, a in zip(questions, answers, strict=True)])}
    if choice:
        right = [_is_right(q, a, by_bytes=True) for q, a in zip(questions, answers, strict=True)]
        found["accuracy per byte"] = _mean(right)
    found["bits per byte"] = Metric(bits, np.array([float(score.num_bytes) for score in gold]))
    if not choice:
        found["bits"] = Metric(bits, np.ones(len(bits)))
    texts = [answer.text for answer in answers]
    if questions and all(question.writing for question in questions) and None not in texts:
        right = [last_number(text or "") == last_number(q.answer) for q, text in zip(questions, texts, strict=True)]
        found["exact answer"] = _mean(right)
    return found


def chance(questions: Sequence[Question]) -> float:
    """The accuracy of guessing: 0 for clozes."""
    if not questions:
        return math.nan
    return sum(1 / len(question.pairs) if question.is_choice else 0.0 for question in questions) / len(questions)


def ratio(above: Metric, below: Metric) -> Estimate:
    """One score over another of the same questions (retention, or what is kept under noise), which are paired.

    With r = a/b and both measured on the same questions, the error is that of the mean of ``(a_i - r b_i) / b``.
    """
    a, b = above.estimate().value, below.estimate().value
    if not b > 0:
        return Estimate(math.nan, math.nan)
    r = a / b
    # Each score's own linearisation, so that ratios of sums are covered too.
    over = (above.values - a * above.weights) / above.weights.mean()
    under = (below.values - b * below.weights) / below.weights.mean()
    return Estimate(r, _error((over - r * under) / b))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates; those that are NaN are left out."""
    estimates = [estimate for estimate in estimates if not math.isnan(estimate.value)]
    if not estimates:
        return Estimate(math.nan, math.nan)
    variance = sum(estimate.error**2 for estimate in estimates)
    return Estimate(
        sum(estimate.value for estimate in estimates) / len(estimates), math.sqrt(variance) / len(estimates)
    )


def last_number(text: str) -> float | None:
    """The last number in a text, commas between its digits left out; None where there is none."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def _is_right(question: Question, answer: Answer, by_bytes: bool = False) -> bool:
    if not question.is_choice:
        return answer.scores[0].is_greedy
    worth = [score.log_likelihood / (score.num_bytes if by_bytes else 1) for score in answer.scores]
    return worth.index(max(worth)) == question.gold


def _mean(values: Sequence[bool]) -> Metric:
    return Metric(np.array(values, dtype=float), np.ones(len(values)))


def _error(values: np.ndarray) -> float:
    """The standard error of the mean of n values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
