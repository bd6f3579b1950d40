"""Questions put to a model, in batches, with the answers kept on disk line by line: a killed run goes on."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evals.examinee import Examinee
from evals.metrics import Answer
from evals.questions import Question
from models import ContinuationScore
from training.errors import UserError


class Sheet:
    """Answers to the questions of one task, in a file of lines: what was asked of whom, then an answer each.

    Args:
        path: of the file; it and its folder are made where they are missing.
        facts: what answers depend on besides the question: the model, the seed of a noise, ….

    Raises:
        UserError: the file holds answers to something else, or can't be written.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self._answers: dict[int, Answer] = {}
        head = json.dumps(facts, sort_keys=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            if lines and lines[0] != f"{head}\n".encode() and lines[0].endswith(b"\n"):
                raise UserError(
                    f"{path} holds answers that were got otherwise ({_difference(lines[0], facts)}): "
                    "give another --out, or --overwrite"
                )
            whole = [line for line in lines[1:] if line.endswith(b"\n")]  # a killed run leaves half a line
            for line in whole:
                number, answer = _read(line)
                self._answers[number] = answer
            kept = path.with_name(f".{path.name}.partial")
            kept.write_bytes(b"".join([f"{head}\n".encode(), *whole]))
            kept.replace(path)
            self._file = path.open("ab")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, or give --overwrite") from error

    def __contains__(self, question: Question) -> bool:
        return question.number in self._answers

    def __getitem__(self, question: Question) -> Answer:
        return self._answers[question.number]

    def add(self, question: Question, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        scores = [[score.log_likelihood, score.num_bytes, score.is_greedy] for score in answer.scores]
        line = json.dumps({"number": question.number, "scores": scores, "text": answer.text})
        try:
            self._file.write(f"{line}\n".encode())
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; the same command goes on from there"
            ) from error
        self._answers[question.number] = answer

    def close(self) -> None:
        self._file.close()


def _read(line: bytes) -> tuple[int, Answer]:
    row = json.loads(line)
    scores = tuple(ContinuationScore(float(ll), int(size), bool(greedy)) for ll, size, greedy in row["scores"])
    return int(row["number"]), Answer(scores, row["text"])


def _difference(line: bytes, facts: dict[str, Any]) -> str:
    try:
        found = json.loads(line)
        return next(
            f"{key}: {found.get(key)!r} then, {facts[key]!r} now" for key in facts if found.get(key) != facts[key]
        )
    except (ValueError, AttributeError, StopIteration):
        return "its first line is another"


def ask(examinee: Examinee, questions: Sequence[Question], sheet: Sheet, title: str, *, bar: bool = True) -> None:
    """Put to a model the questions that the sheet has no answer to, longest first.

    An answer does not depend on the other questions nor on the size of batches.

    Raises:
        UserError: a question that can't be scored, by its task and number.
    """
    missing = sorted((q for q in questions if q not in sheet), key=_length, reverse=True)
    with tqdm(total=len(questions), initial=len(questions) - len(missing), desc=title, disable=not bar) as shown:
        for batch in _batches(missing, examinee.scorer.batch_bytes):
            for question, answer in zip(batch, _answers(examinee, batch), strict=True):
                sheet.add(question, answer)
            shown.update(len(batch))


def _length(question: Question) -> int:
    return sum(len(context.encode()) + len(continuation.encode()) for context, continuation in question.pairs)


def _batches(questions: Sequence[Question], most: int) -> Iterator[list[Question]]:
    batch: list[Question] = []
    filled = 0
    for question in questions:
        if batch and filled + _length(question) > most:
            yield batch
            batch, filled = [], 0
        batch.append(question)
        filled += _length(question)
    if batch:
        yield batch


def _answers(examinee: Examinee, batch: Sequence[Question]) -> list[Answer]:
    """A batch's answers; where it is refused, its questions are asked one by one, so that the error names the one."""
    try:
        return _asked(examinee, batch)
    except ValueError:
        found = []
        for question in batch:
            try:
                found += _asked(examinee, [question])
            except ValueError as error:
                reason = str(error).partition(": ")[2] if str(error).startswith("pair ") else str(error)
                raise UserError(f"task {question.task}, question {question.number}: {reason}") from error
        return found


def _asked(examinee: Examinee, batch: Sequence[Question]) -> list[Answer]:
    pairs = [pair for question in batch if not question.is_text for pair in question.pairs]
    texts = [question.pairs[0][1] for question in batch if question.is_text]
    scores, rolled = iter(examinee.scorer.score(pairs)), iter(examinee.scorer.rolling(texts))
    found = [tuple(next(rolled if question.is_text else scores) for _ in question.pairs) for question in batch]
    written: list[str | None] = [None] * len(batch)
    if examinee.writes:
        for writing in dict.fromkeys(question.writing for question in batch):
            if writing is not None:
                same = [i for i, question in enumerate(batch) if question.writing == writing]
                prompts = [batch[i].pairs[0][0] for i in same]
                new = examinee.write(prompts, max_tokens=writing.max_tokens, stop=writing.stop)
                for i, text in zip(same, new, strict=True):
                    written[i] = text
    return [Answer(each, text) for each, text in zip(found, written, strict=True)]
