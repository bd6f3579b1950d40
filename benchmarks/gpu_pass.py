"""Everything that wants a GPU, in one command: the install, the GPU tests, every benchmark with its peers, one summary.

``python benchmarks/gpu_pass.py --out DIR``; ``--dry-run`` lists the steps and runs the benchmarks small, on the CPU.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch

from benchmarks import machine
from benchmarks.report import Report, aligned, table

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """A command of the pass.

    Attributes:
        name: of its log.
        command: run in the checkout; its exit status says whether it passed.
        report: the JSON file that it writes, for the summary.
    """

    name: str
    command: list[str]
    report: Path | None = None


def steps(out: Path, *, quick_on_cpu: bool = False) -> list[Step]:
    """The GPU tests and the benchmarks; with ``quick_on_cpu`` the benchmarks alone, as a CPU can run them."""
    where = ["--device", "cpu", "--quick"] if quick_on_cpu else ["--device", "cuda"]
    made = [] if quick_on_cpu else [Step("gpu_tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"])]
    for path in sorted(ROOT.glob("benchmarks/bench_*.py")):
        report = out / f"{path.stem}.json"
        files = ["--json", str(report), "--plot", str(out / f"{path.stem}.png")]
        made.append(Step(path.stem, [sys.executable, str(path.relative_to(ROOT)), *where, *files], report))
    return made


def missing(*, gpu: bool) -> list[str]:
    """What the install lacks, each with the fix."""
    lacking = []
    for module, fix in {
        "bytekernels": "run in the checkout, with torch",
        "bytekernels._C": "`pip install -e .` in the checkout builds it",
        **({"triton": "`pip install triton`"} if gpu else {}),
    }.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken binary raises whatever it likes
            lacking.append(f"{module} can't be imported ({type(error).__name__}: {error}): {fix}")
    if gpu and not torch.cuda.is_available():
        lacking.append(f"torch {torch.__version__} sees no CUDA device: install its CUDA build, or use --dry-run")
    return lacking


def run(step: Step, out: Path) -> bool:
    """Run a step, showing and logging what it prints; whether it passed."""
    if step.report is not None:
        step.report.unlink(missing_ok=True)  # one that an earlier pass left must not pass for this one's
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    return process.wait() == 0


def summary(results: Sequence[tuple[str, str, float]], reports: Sequence[Path]) -> str:
    """Every row of every benchmark in one table, then what became of each step."""
    merged: Report | None = None
    for path in reports:
        if path.exists():
            report = Report(**json.loads(path.read_text()))
            if merged is None:
                merged = report
            else:
                merged.rows += report.rows
                merged.refused += report.refused
                merged.skipped += [item for item in report.skipped if item not in merged.skipped]
    cells = [["step", "result", "seconds"], *([name, result, f"{seconds:.0f}"] for name, result, seconds in results)]
    parts = [] if merged is None else [machine.line(merged.machine), table(merged)]
    return "\n\n".join([*parts, "\n".join(aligned(cells, left=2))])


def carry_out(out: Path, *, dry: bool) -> int:
    """All steps, whatever becomes of those before; the number that failed."""
    begin = time.perf_counter()
    lacking = missing(gpu=not dry)
    print(*(lacking or ["install: nothing is missing"]), sep="\n", flush=True)
    results = [("install", "FAILED" if lacking else "passed", time.perf_counter() - begin)]
    todo = steps(out, quick_on_cpu=dry)
    for step in todo:
        print(f"\n=== {step.name}: {' '.join(step.command)}", flush=True)
        begin = time.perf_counter()
        passed = run(step, out)
        results.append((step.name, "passed" if passed else "FAILED", time.perf_counter() - begin))
    text = summary(results, [step.report for step in todo if step.report is not None])
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}")
    return sum(result == "FAILED" for _, result, _ in results)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_pass.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for logs, JSON files, plots, summary.txt (default: $OUT, or benchmarks/results)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the steps and run what a CPU can")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is a file, not a folder")
    out = options.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")

    if options.dry_run:
        print("A machine with a GPU would check the install, then run:")
        print(*(f"  {' '.join(step.command)}" for step in steps(out)), sep="\n")
        print("Here, of these, what a CPU can run:", flush=True)
        if options.out is None:
            with tempfile.TemporaryDirectory() as folder:
                return 1 if carry_out(Path(folder), dry=True) else 0
    out.mkdir(parents=True, exist_ok=True)
    return 1 if carry_out(out.resolve(), dry=options.dry_run) else 0


if __name__ == "__main__":
    sys.exit(main())
