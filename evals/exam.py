"""Questions put to a model, in batches, with the answers kept on disk line by line: a killed run goes on."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bytekernels.files import write_whole
from evals.examinee import BYTES_PER_TOKEN, Examinee
from evals.metrics import Answer
from evals.questions import Question
from models import ContinuationScore
from models.scoring import batches
from training.errors import UserError
from training.run_folder import first_difference


class Sheet:
    """Answers to the questions of one task, in a file of lines: who answers, then a line for each question.

    A line holds a digest of what was asked, so an answer to another text under the same number is no answer.

    Args:
        path: of the file; it and its folder are made where they are missing.
        facts: what answers depend on besides the question: the model and how it is scored.

    Raises:
        UserError: the file holds answers of another model, or can't be written.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self._answers: dict[tuple[int, str], Answer] = {}
        head = json.dumps(facts, sort_keys=True)
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            if lines and lines[0] != f"{head}\n".encode() and lines[0].endswith(b"\n"):
                raise UserError(
                    f"{path} holds answers that were got otherwise ({first_difference(_head(lines[0]), facts)}): "
                    "give another --out, or --overwrite"
                )
            whole = [line for line in lines[1:] if line.endswith(b"\n")]  # a killed run leaves half a line
            self._answers |= dict(map(_read, whole))
            kept = b"".join([f"{head}\n".encode(), *whole])
            write_whole(path, lambda partial: partial.write_bytes(kept))
            self._file = path.open("ab")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, or give --overwrite") from error

    def __contains__(self, question: Question) -> bool:
        return (question.number, question.digest) in self._answers

    def __getitem__(self, question: Question) -> Answer:
        return self._answers[question.number, question.digest]

    def add(self, question: Question, answer: Answer) -> None:
        """Keep an answer; it has been handed to the system when this returns."""
        scores = [[score.log_likelihood, score.num_bytes, score.is_greedy] for score in answer.scores]
        row = {"number": question.number, "asked": question.digest, "scores": scores, "text": answer.text}
        try:
            self._file.write(f"{json.dumps(row)}\n".encode())
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; the same command goes on from there"
            ) from error
        self._answers[question.number, question.digest] = answer

    def close(self) -> None:
        self._file.close()


def _read(line: bytes) -> tuple[tuple[int, str], Answer]:
    row = json.loads(line)
    scores = tuple(ContinuationScore(float(ll), int(size), bool(greedy)) for ll, size, greedy in row["scores"])
    return (int(row["number"]), str(row["asked"])), Answer(scores, row["text"])


def _head(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def ask(examinee: Examinee, questions: Sequence[Question], sheet: Sheet, title: str, *, bar: bool = True) -> None:
    """Put to a model the questions that the sheet has no answer to, longest first.

    An answer does not depend on the other questions nor on the size of batches.

    Raises:
        UserError: a question that can't be scored, by its task and number.
    """
    missing = [question for question in questions if question not in sheet]
    with tqdm(total=len(questions), initial=len(questions) - len(missing), desc=title, disable=not bar) as shown:
        for places in batches(list(map(_length, missing)), examinee.scorer.batch_bytes):
            batch = [missing[place] for place in places]
            for question, answer in zip(batch, _answers(examinee, batch), strict=True):
                sheet.add(question, answer)
            shown.update(len(batch))


def _length(question: Question) -> int:
    """Bytes that are scored and written."""
    scored = sum(len(context.encode()) + len(continuation.encode()) for context, continuation in question.pairs)
    return scored + (BYTES_PER_TOKEN * question.writing.max_tokens if question.writing else 0)


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
    found = [[next(rolled if question.is_text else scores) for _ in question.pairs] for question in batch]
    for question, each in zip(batch, found, strict=True):
        if not all(math.isfinite(score.log_likelihood) for score in each):
            raise UserError(f"task {question.task}, question {question.number}: the model's score is not finite")
    written: list[str | None] = [None] * len(batch)
    _end_words(examinee, batch, found)
    for writing in dict.fromkeys(question.writing for question in batch):
        if writing is not None:
            same = [i for i, question in enumerate(batch) if question.writing == writing]
            prompts = [batch[i].pairs[0][0] for i in same]
            new = examinee.write(prompts, max_tokens=writing.max_tokens, stop=writing.stop)
            for i, text in zip(same, new, strict=True):
                written[i] = text
    return [Answer(tuple(each), text) for each, text in zip(found, written, strict=True)]


def _end_words(examinee: Examinee, batch: Sequence[Question], found: list[list[ContinuationScore]]) -> None:
    """Greedy decoding writes a word only where it does not go on with more letters: "sign" is not written by "signs".

    Tokens say so themselves for the most part; bytes don't, so whoever writes is asked what comes next.
    """
    words = [
        i
        for i, question in enumerate(batch)
        if not (question.is_choice or question.is_text or question.writing)
        and found[i][0].is_greedy
        and question.pairs[0][1][-1:].isalnum()
    ]
    if words:
        following = examinee.write(["".join(batch[i].pairs[0]) for i in words], max_tokens=1, stop=())
        for i, text in zip(words, following, strict=True):
            found[i][0] = replace(found[i][0], is_greedy=not text[:1].isalnum())
