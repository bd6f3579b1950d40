"""Everything that wants a GPU, in one command: install, GPU tests, sanitizers, benchmarks with their peers, a summary.

``python benchmarks/gpu_pass.py --out DIR``; ``--dry-run`` lists the steps and runs the benchmarks small, on the CPU.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch

from benchmarks import machine
from benchmarks.report import Report, aligned, table

ROOT = Path(__file__).resolve().parents[1]
# Where the kernels in CUDA C++ are tested.
SANITIZED = tuple(f"tests/bytekernels/{room}" for room in ("constrain", "marginals", "pack", "suffix"))
CHECKS = ("memcheck", "racecheck")  # tools of compute-sanitizer


@dataclass(frozen=True)
class Step:
    """A command of the pass.

    Attributes:
        name: of its log.
        command: run in the checkout; its exit status says whether it passed.
        report: the JSON file that it writes, for the summary.
        environment: variables besides the pass's own.
        lacking: why it can't run here, where it can't.
    """

    name: str
    command: list[str]
    report: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    lacking: str | None = None

    def __str__(self) -> str:
        variables = (f"{name}={value}" for name, value in self.environment.items())
        return " ".join([*variables, *self.command])


def steps(out: Path, *, quick_on_cpu: bool = False) -> list[Step]:
    """The GPU tests, the sanitizers and the benchmarks; with ``quick_on_cpu`` these alone, as a CPU can run them."""
    where = ["--device", "cpu", "--quick"] if quick_on_cpu else ["--device", "cuda"]
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    made = [] if quick_on_cpu else [Step("gpu_tests", [*tests, "tests"]), *sanitizers([*tests, *SANITIZED])]
    for path in sorted(ROOT.glob("benchmarks/bench_*.py")):
        report = out / f"{path.stem}.json"
        command = [sys.executable, str(path.relative_to(ROOT)), *where, "--json", str(report)]
        if path.stem == "bench_decode":  # whole texts, and so no rows for the table of kernels
            made.append(Step(path.stem, command))
        else:
            made.append(Step(path.stem, [*command, "--plot", str(out / f"{path.stem}.png")], report))
    return made


def sanitizers(tests: list[str]) -> list[Step]:
    """The tests under each of :data:`CHECKS`.

    Torch's caching allocator hands out parts of large blocks, beyond whose ends memcheck would see nothing wrong, so
    every tensor gets a block of its own.
    """
    where = ["PATH", "CUDA_HOME/bin", "/usr/local/cuda/bin"]
    home = os.environ.get("CUDA_HOME")
    folders = [os.environ.get("PATH", os.defpath), *([str(Path(home) / "bin")] if home else []), where[-1]]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    lacking = None if program else f"compute-sanitizer is not in {', '.join(where)}: install the CUDA toolkit"
    return [
        Step(
            check,
            [program or "compute-sanitizer", "--error-exitcode", "1", "--tool", check, *tests],
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            lacking=lacking,
        )
        for check in CHECKS
    ]


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
            step.command,
            cwd=ROOT,
            env={**os.environ, **step.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
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
        print(f"\n=== {step.name}: {step}", flush=True)
        if step.lacking is not None:
            print(step.lacking, flush=True)
            results.append((step.name, "not found", 0.0))
            continue
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
        print(*(f"  {step}" + (f"  ({step.lacking})" if step.lacking else "") for step in steps(out)), sep="\n")
        print("Here, of these, what a CPU can run:", flush=True)
        if options.out is None:
            with tempfile.TemporaryDirectory() as folder:
                return 1 if carry_out(Path(folder), dry=True) else 0
    out.mkdir(parents=True, exist_ok=True)
    return 1 if carry_out(out.resolve(), dry=options.dry_run) else 0


if __name__ == "__main__":
    sys.exit(main())
