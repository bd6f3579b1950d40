"""What the benchmarks' commands have in common: their flags, and what they print and write at the end."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.report import PASSES, Report, plot, table, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser(prog: str, description: str, ops: Sequence[str], providers: Sequence[str]) -> argparse.ArgumentParser:
    """The flags that every benchmark has. ``gpu_pass.py`` relies on --device, --quick, --json and --plot."""
    flags = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    add = flags.add_argument
    add("--device", type=_device, default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
    add("--op", nargs="+", choices=ops, default=list(ops), help="the ops to measure (default: all)")
    add("--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: all")
    add("--provider", nargs="+", choices=providers, help="default: all but reference (and compile, with --quick)")
    add("--quick", action="store_true", help="small, few rounds, no compiling: whether it runs")
    add("--json", type=_target(".json"), metavar="FILE.json", help="write the report")
    add("--plot", type=_target(".png"), metavar="FILE.png", help="draw the bandwidths of what was timed")
    return flags


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is no device that benchmarks run on: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise argparse.ArgumentTypeError(f"{text!r} is not there, torch sees {count} CUDA devices: use --device cpu")
    return device


def _target(suffix: str) -> Callable[[str], Path]:
    def target(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix or path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} must be a file whose name ends in {suffix}")
        return path

    return target


def publish(report: Report, options: argparse.Namespace, *extra: str) -> int:
    """Print the report, and write what --json and --plot ask for.

    Args:
        report: of this run.
        options: parsed by :func:`parser`'s parser.
        extra: paragraphs printed below the table.

    Returns:
        The exit status: 1 where a provider was refused.
    """
    print(*filter(None, (machine.line(report.machine), table(report), *extra)), sep="\n\n")
    if options.json:
        write_json(options.json, vars(report))
    if options.plot and report.rows:
        plot(options.plot, report)
    return 1 if report.refused else 0
