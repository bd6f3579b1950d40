"""What each part of the curriculum is worth: ``python evals/ablations.py [ROW …] --seeds 0 1 2``.

Each row of ``ablations.toml`` is the recipe ``ablation`` with a few keys changed, run once for each seed by the command
that ``--commands`` prints; ``base`` comes first, because others start from its stages. What is there already is not run
again; a row whose settings have changed since is refused. ``--table`` writes what has been run to a Markdown page and a
JSON file.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import numpy as np

from bytekernels.files import write_json, write_whole
from evals.report import table
from models.command import CommandParser, counting_number
from training.errors import UserError
from training.report import versions
from training.stage_recipe import STAGES
from training.tables import build
from training.text import Document, is_held_out, is_utf8, python_docs, python_files, read_documents

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).with_name("ablations.toml")
BASE = "base"
RECIPE = ROOT / "training" / "recipes" / "ablation.toml"
PROSE_BYTES, CODE_BYTES = 12_000_000, 12_000_000
INTRODUCTION = (
    "Means over seeds ± standard deviations. `python evals/ablations.py ROW --seeds 0 1 2` runs a row (`base` first);",
    "with `--commands` it prints what that is, and `--table docs/results/ablations` writes this page. What the table",
    "says, and what it does not: [a reading](../ablations.md). KL is to the teacher's next token, in nats a token, at",
    "the end of the stage that distils; rows that begin after it have the base's.",
)
NOISES = ("antspeak", "drop", "random_case", "missing_space")


@dataclass(frozen=True)
class Row:
    """A row of the table; the file says what its keys mean."""

    title: str
    set: tuple[str, ...] = ()
    start: str | None = None
    teacher: str = BASE
    stage_1: str = "prose"
    stage_2: str = "prose"
    measures: tuple[str, ...] = ()
    name: str = field(default="")


@dataclass(frozen=True)
class Job:
    """A row with a seed, in its folder."""

    row: Row
    seed: int
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / self.row.name / str(self.seed)

    @property
    def report(self) -> Path:
        """Where its outcome lies."""
        return self.run / "stage-2" / "report.json" if self.is_split else self.run / "report.json"

    @property
    def is_split(self) -> bool:
        """Its two halves are runs of their own, on other text."""
        return self.row.stage_1 != self.row.stage_2 and self.row.start is None

    def teacher(self) -> str:
        """The folder of its teacher, or whose it is where that has not been made yet."""
        maker = self.folder / self.row.teacher / "0" / "report.json"
        return json.loads(maker.read_text())["teacher_folder"] if maker.is_file() else f"TEACHER-OF-{self.row.teacher}"

    def lacks(self) -> str | None:
        """The run that it needs and that is not there."""
        needs = [] if self.makes_teacher else [Job(Row("", name=self.row.teacher), 0, self.folder)]
        if self.row.start is not None:
            needs.append(Job(Row("", name=BASE), self.seed, self.folder))
        return next((f"{job.row.name}, seed {job.seed}" for job in needs if not job.report.is_file()), None)

    @property
    def mark(self) -> Path:
        """What it was run as."""
        return self.run / "row.json"

    @property
    def facts(self) -> dict[str, Any]:
        return {**asdict(self.row), "title": "", "recipe": RECIPE.read_text()}

    def claim(self) -> None:
        """Keep what it is run as.

        Raises:
            UserError: it was begun with another recipe or as another row.
        """
        facts = json.loads(json.dumps(self.facts))
        if self.mark.is_file() and json.loads(self.mark.read_text()) != facts:
            raise UserError(f"{self.run} was run with other settings: remove it, or give another --out")
        write_json(self.mark, facts)

    @property
    def makes_teacher(self) -> bool:
        return self.seed == 0 and self.row.teacher == self.row.name

    def commands(self) -> Iterator[list[str]]:
        """The commands that make it, one after another."""
        settings = [f"seed={self.seed}", *self.row.set]
        given = [] if self.makes_teacher else ["--teacher", self.teacher()]
        if self.row.start is not None:
            rest = STAGES[STAGES.index(self.row.start) + 1 :]
            settings.append(f"curriculum={json.dumps(rest)}")
            given += ["--from", str(self.folder / BASE / str(self.seed) / "stages" / self.row.start)]
        if not self.is_split:
            yield self._stage(self.run, [*given, *self._data(self.row.stage_2)], settings)
            return
        first, second = (f"curriculum={json.dumps(names)}" for names in (STAGES[:3], STAGES[3:]))
        start = ["--from", str(self.run / "stage-1" / "stages" / "1.3")]
        yield self._stage(self.run / "stage-1", [*given, *self._data(self.row.stage_1)], [*settings, first])
        yield self._stage(self.run / "stage-2", [*given, *start, *self._data(self.row.stage_2)], [*settings, second])

    def _data(self, kind: str) -> list[str]:
        return ["--data", str(self.folder / f"{kind}.jsonl")]

    def _stage(self, out: Path, given: Sequence[str], settings: Sequence[str]) -> list[str]:
        words = ["training/stage.py", "--stage", "all", "--recipe", "ablation", *given]
        words += ["--out", str(out), "--cache", str(self.folder / "cache"), "--device", "cpu"]
        words += [word for setting in settings for word in ("--set", setting)]
        return [sys.executable, *words, *(["--resume"] if (out / "recipe.json").exists() else [])]

    def measures(self) -> Iterator[tuple[Path, list[str]]]:
        """What is measured of its model, by the file that it goes to."""
        model, text = self.report.parent / "model", str(self.folder / "held-out.jsonl")
        out = self.run / "measures"
        if "noise" in self.row.measures:
            words = ["evals/run.py", "--model", str(model), "--suite", "noise", "--tasks", "continuation"]
            words += ["--noises", ",".join(NOISES), "--text", text, "--limit", "200", "--out", str(out)]
            yield out / "noise.json", [sys.executable, *words]
        if "boundaries" in self.row.measures:
            words = ["-m", "evals.boundaries", str(model), "--teacher", self.teacher(), "--text", text]
            words += ["--noises", *NOISES, "--json", str(out / "boundaries.json")]
            yield out / "boundaries.json", [sys.executable, *words]
        if "next_word" in self.row.measures:
            words = ["-m", "evals.next_word", str(model), "--text", text, "--json", str(out / "next-word.json")]
            yield out / "next-word.json", [sys.executable, *words]


def read_rows() -> dict[str, Row]:
    """The rows of the file, by name."""
    tables = tomllib.loads(ROWS.read_text())
    return {name: build(Row, {**each, "name": name}, str(ROWS), "") for name, each in tables.items()}


def write_text(folder: Path) -> None:
    """Prose (the installation's documentation), code (Python's standard library) and held-out prose, as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{name}.jsonl").exists() for name in ("prose", "code", "held-out")):
        return
    for name, documents in (("prose", python_docs(limit_bytes=PROSE_BYTES)), ("code", python_sources())):
        _write_lines(folder / f"{name}.jsonl", documents)
    # Which documents are held out is decided by their names in the file.
    held_out = (each for each in read_documents([str(folder / "prose.jsonl")]) if is_held_out(each.source))
    _write_lines(folder / "held-out.jsonl", held_out)


def _write_lines(path: Path, documents: Iterable[Document]) -> None:
    text = "".join(json.dumps({"text": document.text.decode()}) + "\n" for document in documents)
    write_whole(path, lambda partial: partial.write_text(text))


def python_sources(limit_bytes: int = CODE_BYTES) -> Iterator[Document]:
    """Python's standard library, a document for each file, in the order of a hash of their names."""
    total = 0
    for name, path in python_files():
        if name.startswith("stdlib/") and is_utf8(text := Path(path).read_bytes()):
            total += len(text)
            if total > limit_bytes:
                return
            yield Document(name, text)


def carry_out(job: Job, threads: int) -> str | None:
    """Run what a job lacks; returns what went wrong, or None."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}

    def run(command: Sequence[str]) -> str | None:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return None if done.returncode == 0 else f"{job.row.name}, seed {job.seed}: {' '.join(last)}"

    try:
        if needed := job.lacks():
            raise UserError(f"it starts from {needed}, which has not been run")
        job.claim()
    except UserError as refusal:
        return f"{job.row.name}, seed {job.seed}: {refusal}"
    if not job.report.is_file():
        for command in job.commands():
            if error := run(command):
                return error
    for path, command in job.measures():
        if not path.is_file() and (error := run(command)):
            return error
    print(f"{job.row.name}, seed {job.seed}: done", flush=True)
    return None


def in_order(jobs: Sequence[Job]) -> tuple[list[Job], list[Job], list[Job]]:
    """Jobs by what they need of others.

    Returns:
        Those that make teachers or prepare a text, which go one by one because the cache is shared; the other seeds of
        the base; all the rest.
    """
    code = next((job for job in jobs if job.row.start is None and "code" in (job.row.stage_1, job.row.stage_2)), None)
    first = [job for job in jobs if job.makes_teacher]
    first.sort(key=lambda job: job.row.name != BASE)
    first += [code] if code is not None else []
    bases = [job for job in jobs if job.row.name == BASE and job not in first]
    return first, bases, [job for job in jobs if job not in first and job not in bases]


def outcome(job: Job) -> dict[str, float]:
    """A finished job's figures, by name."""
    report = json.loads(job.report.read_text())
    found = {name: report[name] for name in ("student_bpb", "retention", "boundary_f1", "teacher_bpb")}
    found["leaking"] = report["teacher_forced_leaking_bits"]
    for row in report["stages"]:
        found |= {f"{row['stage']} {name}": value for name, value in row["after"].items()}
    for path, _ in job.measures():
        measured = json.loads(path.read_text())
        if path.name == "noise.json":
            found |= {f"kept, {name}": row["student"]["bits kept"][0] for name, row in measured["noise"].items()}
        elif path.name == "boundaries.json":
            found |= {f"F1, {name}": row["all"]["f1"] for name, row in measured["by distance"].items()}
        else:
            found |= {f"next words, {mode}": row[0] for mode, row in measured["next words"].items()}
    return {name: value for name, value in found.items() if value is not None}


def results(rows: Sequence[Row], folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by row and seed, of what has been run."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        seeds = sorted(int(path.name) for path in (folder / row.name).glob("*") if path.name.isdigit())
        jobs = [Job(row, seed, folder) for seed in seeds]
        finished = {
            str(job.seed): outcome(job)
            for job in jobs
            if job.report.is_file() and all(path.is_file() for path, _ in job.measures())
        }
        if finished:
            found[row.name] = finished
    return found


def mean_and_sd(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def page(rows: Sequence[Row], found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The tables: means over seeds ± standard deviations."""

    def cells(row: Row, *names: str) -> list[str]:
        return [mean_and_sd([one[name] for one in found[row.name].values() if name in one]) for name in names]

    def behind(row: Row) -> str:
        """Bits per byte above the base's of the same seed."""
        base = found.get(BASE, {}) if row.stage_2 == "prose" else {}  # bits of code are no bits of prose
        pairs = [(one, base[seed]) for seed, one in found[row.name].items() if seed in base]
        return mean_and_sd([one["student_bpb"] - other["student_bpb"] for one, other in pairs if "student_bpb" in one])

    def token_kl(row: Row) -> str:
        """After the stage that distils."""
        return cells(row, "1.2 kl")[0] or cells(row, "joint kl")[0]

    shown = [row for row in rows if row.name in found]
    intro = ["# Ablations", "", *INTRODUCTION, ""]
    head = ["row", "scored on", "seeds", "KL after stage 1", "bits/byte", "above the base", "retention", "boundary F1"]
    head.append("teacher-forced, leaks")
    lines = intro + table(
        head,
        [
            [
                *(f"`{row.name}`: {row.title}", row.stage_2, str(len(found[row.name])), token_kl(row)),
                *(*cells(row, "student_bpb"), behind(row)),
                *cells(row, "retention", "boundary_f1", "leaking"),
            ]
            for row in shown
        ],
    )
    for kind, clean in (("kept", ()), ("F1", ("clean",))):
        names = [f"{kind}, {noise}" for noise in (*clean, *NOISES)]
        measured = [row for row in shown if any(names[0] in one for one in found[row.name].values())]
        if measured:
            what = "bits kept of continuations under noise" if kind == "kept" else "boundary F1 against the tokenizer's"
            lines += ["", f"By noise: {what}.", ""]
            lines += table(
                ["row", *(name.partition(", ")[2] for name in names)],
                [[f"`{r.name}`", *cells(r, *names)] for r in measured],
            )
    words = [row for row in shown if "next_word" in row.measures]
    if words:
        names = ["next words, joint", "next words, multibyte"]
        lines += ["", "Share of next words written right, by how they are written.", ""]
        lines += table(["row", "joint", "multi-byte"], [[f"`{row.name}`", *cells(row, *names)] for row in words])
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 where a row failed."""
    parser = CommandParser(
        prog="ablations.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all rows of evals/ablations.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="default: runs/ablations")
    parser.add_argument("--jobs", type=counting_number, default=1, help="rows at once (default: 1)")
    parser.add_argument(
        "--threads", type=counting_number, help="of each row (default: the cores over the rows at once)"
    )
    parser.add_argument("--commands", action="store_true", help="print the commands, and run nothing")
    parser.add_argument("--table", type=Path, metavar="STEM", help="write STEM.md and STEM.json of what has been run")
    options = parser.parse_args(arguments)
    rows = read_rows()
    for name in options.rows:
        if name not in rows:
            parser.error(f"no row {name!r}; there are {', '.join(rows)}")
    folder = options.out.resolve()
    jobs = [Job(rows[name], seed, folder) for seed in dict.fromkeys(options.seeds) for name in options.rows or rows]
    errors: list[str] = []
    try:
        write_text(folder)
        if options.commands:
            for job in jobs:
                if needed := job.lacks():
                    raise UserError(f"{job.row.name}, seed {job.seed}, starts from {needed}: run that first")
                for command in [*job.commands(), *(words for _, words in job.measures())]:
                    print(shlex.join(command))
            return 0
        for number, phase in enumerate(in_order(jobs)):
            at_once = options.jobs if number else 1
            threads = options.threads or max(1, (os.cpu_count() or 1) // at_once)
            with ThreadPoolExecutor(at_once) as pool:
                errors += [error for error in pool.map(partial(carry_out, threads=threads), phase) if error]
    except (UserError, OSError) as error:
        parser.error(str(error))
    if options.table:
        found = results(list(rows.values()), folder)
        text = page(list(rows.values()), found)
        write_whole(options.table.with_suffix(".md"), lambda partial: partial.write_text(text))
        whole: dict[str, Any] = {"versions": versions(), "rows": found}
        write_json(options.table.with_suffix(".json"), whole)
    for failure in errors:
        print(f"ablations.py: {failure}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
