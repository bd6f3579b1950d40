"""Where resilience goes: ``python -m evals.by_stage RUN --teacher DIR --text FILES``.

The suite ``noise`` at the end of each stage of a run: models of stage 1 at the ends of the teacher's tokens, those of
stage 2 by their own chunks. Arguments after ``--`` go to ``evals/run.py``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytekernels.files import write_json
from evals import run
from evals.report import cell, table
from evals.results import STUDENT
from models.command import CommandParser
from training.checkpoint import read_summary
from training.errors import UserError

BY_BYTES = ("2.1", "2.2")
SHOWN = {"kept": "Score kept", "bits kept": "Bits kept"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(
        prog="python -m evals.by_stage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, such as runs/quickstart")
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher of that run")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="as in evals/run.py")
    parser.add_argument("--out", type=Path, default=Path("runs/evals-by-stage"), help="default: runs/evals-by-stage")
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    stages = [path for path in sorted((options.run / "stages").glob("*")) if read_summary(path) is not None]
    stages = [path for path in stages if path.name != "control"]
    if not stages:
        parser.error(f"{options.run} has no finished stage: give a run's folder")
    reports = {}
    try:
        for path in stages:
            words = ["--model", str(path), "--suite", "noise", "--out", str(options.out / path.name), *given[cut + 1 :]]
            words += ["--text", *options.text] if options.text else []
            if path.name not in BY_BYTES:
                words += ["--teacher", str(options.teacher), "--by-tokens", "--student-only"]
            reports[path.name] = run.examine(run.parse(words))
        write_json(options.out / "by-stage.json", reports)
    except (UserError, OSError) as error:
        parser.error(str(error))
    print("\n".join(page(reports)))
    return 0


def page(reports: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a table: of each stage's model, what is kept under each noise."""
    lines: list[str] = []
    for key, title in SHOWN.items():
        noises = list(next(iter(reports.values()))["noise"])
        rows = {
            name: [report["noise"][noise][STUDENT].get(key) for noise in noises] for name, report in reports.items()
        }
        if any(each for row in rows.values() for each in row):
            whole = [[name, *(cell(each, True) for each in row)] for name, row in rows.items()]
            lines += [*([""] if lines else []), f"{title} by stage.", "", *table(["stage", *noises], whole)]
    return lines


if __name__ == "__main__":
    sys.exit(main())
