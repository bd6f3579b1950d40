"""What an examination came to, as plain data: scores of teacher and student by task, and what is made of the two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.exam import Sheet
from evals.metrics import Estimate, Metric, chance, mean_of, metrics_of, ratio
from evals.questions import Question

TEACHER, STUDENT, BITS = "teacher", "student", "bits per byte"


@dataclass(frozen=True)
class Exam:
    """The questions of a task, clean or under a noise.

    Attributes:
        task: its name.
        noise: its name, or ``""``.
        metric: the task's score.
        questions: as they are asked.
    """

    task: str
    noise: str
    metric: str
    questions: Sequence[Question]

    @property
    def name(self) -> str:
        return f"{self.task}.{self.noise}" if self.noise else self.task


@dataclass(frozen=True)
class Scored:
    """An exam's metrics by who sat it.

    Attributes:
        exam: what was asked.
        metrics: by ``teacher`` and ``student``, those that were examined.
    """

    exam: Exam
    metrics: Mapping[str, Mapping[str, Metric]]

    def score(self, who: str) -> Metric | None:
        """The task's own metric; None where the model was not examined, or does not do what the metric asks for."""
        return self.metrics.get(who, {}).get(self.exam.metric)

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "questions": len(self.exam.questions),
            "metric": self.exam.metric,
            "chance": Estimate(chance(self.exam.questions), 0.0).plain()[0],
        }
        for who, metrics in self.metrics.items():
            found[who] = {name: metric.estimate().plain() for name, metric in metrics.items()}
        teacher, student = self.score(TEACHER), self.score(STUDENT)
        if teacher is not None and student is not None:
            # Fewer bits are better, so their ratio is turned round.
            over = (teacher, student) if self.exam.metric == BITS else (student, teacher)
            found["retention"] = ratio(*over).plain()
        return found


def score_exam(exam: Exam, sheets: Mapping[str, Sheet]) -> Scored:
    """The metrics of whoever has a sheet with all answers."""
    return Scored(
        exam,
        {
            who: metrics_of(exam.questions, [sheet[question] for question in exam.questions])
            for who, sheet in sheets.items()
        },
    )


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """Each exam, the mean score of each model over the clean tasks, and the mean retention.

    Means are over the tasks that all models have a score in; retention's over those where the teacher's is not 0.
    """
    rows = {one.exam.name: one.as_dict() for one in scored}
    clean = [one for one in scored if not one.exam.noise and one.exam.metric != BITS]
    found: dict[str, Any] = {"tasks": rows, "mean": {}}
    examined = [who for who in (TEACHER, STUDENT) if any(who in one.metrics for one in scored)]
    common = [one for one in clean if all(one.score(who) is not None for who in examined)]
    if common:
        for who in examined:
            scores = [metric.estimate() for one in common if (metric := one.score(who)) is not None]
            found["mean"][who] = mean_of(scores).plain()
        found["mean"]["tasks"] = len(common)
    shares = [rows[one.exam.name].get("retention", [None]) for one in common]
    kept = [Estimate(*share) for share in shares if share[0] is not None]
    if kept:
        found["mean"]["retention"] = mean_of(kept).plain()
        found["mean"]["retention over tasks"] = len(kept)
    if any(one.exam.noise for one in scored):
        found["noise"] = kept_under_noise(scored)
    return found


def kept_under_noise(scored: Sequence[Scored]) -> dict[str, Any]:
    """By noise and model: mean scores over tasks, and what is kept of the clean ones.

    ``score``, ``clean`` and ``kept`` (the mean of the tasks' shares) are of tasks that are scored by accuracy;
    ``bits per byte`` and ``bits kept`` (clean bits over noised ones) of those that are scored in bits.
    """
    clean = {one.exam.task: one for one in scored if not one.exam.noise}
    found: dict[str, Any] = {}
    for noise in dict.fromkeys(one.exam.noise for one in scored if one.exam.noise):
        under = [one for one in scored if one.exam.noise == noise]
        found[noise] = {who: _kept(under, clean, who) for who in (TEACHER, STUDENT) if who in under[0].metrics}
    return found


def _kept(under: Sequence[Scored], clean: Mapping[str, Scored], who: str) -> dict[str, list[float | None]]:
    found: dict[str, list[float | None]] = {}
    for in_bits in (False, True):
        pairs = [
            (noisy, before)
            for one in under
            if (one.exam.metric == BITS) == in_bits
            and (noisy := one.score(who)) is not None
            and (before := clean[one.exam.task].score(who)) is not None
        ]
        if pairs and in_bits:
            found[BITS] = mean_of([noisy.estimate() for noisy, _ in pairs]).plain()
            found["bits kept"] = mean_of([ratio(before, noisy) for noisy, before in pairs]).plain()
        elif pairs:
            found["score"] = mean_of([noisy.estimate() for noisy, _ in pairs]).plain()
            found["clean"] = mean_of([before.estimate() for _, before in pairs]).plain()
            found["kept"] = mean_of([ratio(noisy, before) for noisy, before in pairs]).plain()
    return found
