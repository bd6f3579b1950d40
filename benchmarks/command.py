"""What the benchmarks' commands have in common: their flags, and what they print and write at the end."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, machine
from benchmarks.harness import Case, Provider, Unavailable
from benchmarks.report import PASSES, Report, plot, table
from benchmarks.shapes import Shape, parse_shape
from bytekernels.files import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark's command needs to know.

    Attributes:
        prog: the file's name.
        description: one line.
        letters: what the letters of a shape say.
        shapes: the default shape by type of device.
        quick_shape: the default with --quick.
        ops: of all cases.
        provider_names: of all providers.
        on_request: providers that run only when they are named.
        not_quick: providers that --quick leaves out unless they are named.
        cases: of (ops, shape, dtype, device).
        providers: by name, of (names, device).
        paragraph: printed below the table; empty for none.
        arithmetic: whether the roofline counts FLOPs besides traffic.
        dtypes: that --dtype offers; the default is float32 on the CPU, bfloat16 on a GPU, or else the first.
    """

    prog: str
    description: str
    letters: str
    shapes: Mapping[str, Shape]
    quick_shape: Shape
    ops: Sequence[str]
    provider_names: Sequence[str]
    on_request: Sequence[str]
    cases: Callable[[Sequence[str], Any, torch.dtype, torch.device], Iterable[Case]]
    providers: Callable[[Sequence[str], torch.device], Mapping[str, Provider | Unavailable]]
    not_quick: Sequence[str] = ()
    paragraph: Callable[[Report], str] = lambda report: ""
    arithmetic: bool = False
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: DTYPES)


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark as its flags say.

    Returns:
        The exit status: 1 where a provider was refused.
    """
    flags = _parser(benchmark)
    options = flags.parse_args(arguments)
    device = options.device or default_device()
    shape = benchmark.quick_shape if options.quick else benchmark.shapes[device.type]
    if options.shape:
        try:
            shape = parse_shape(options.shape, shape)
        except argparse.ArgumentTypeError as error:
            flags.error(f"argument --shape: {error}")
    usual = "bfloat16" if device.type == "cuda" else "float32"
    dtype = options.dtype or (usual if usual in benchmark.dtypes else next(iter(benchmark.dtypes)))
    absent = {*benchmark.on_request, *(benchmark.not_quick if options.quick else ())}
    names = options.provider or [name for name in benchmark.provider_names if name not in absent]
    print(f"{shape} in {dtype} on {device}", flush=True)
    report = harness.run(
        benchmark.cases(options.op, shape, benchmark.dtypes[dtype], device),
        benchmark.providers(names, device),
        options.passes,
        device,
        harness.QUICK if options.quick else harness.Budget(),
        arithmetic=benchmark.dtypes[dtype] if benchmark.arithmetic else None,
    )
    return _publish(report, options, benchmark.paragraph(report))


def _parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    """The flags that every benchmark has. ``gpu_pass.py`` relies on --device, --quick, --json and --plot."""
    flags = argparse.ArgumentParser(prog=benchmark.prog, description=benchmark.description, allow_abbrev=False)
    add = flags.add_argument
    add("--device", type=_device, default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    usual = "float32 on the CPU, bfloat16 on a GPU" if benchmark.dtypes == DTYPES else next(iter(benchmark.dtypes))
    add("--dtype", choices=benchmark.dtypes, help=f"default: {usual}")
    add("--op", nargs="+", choices=benchmark.ops, default=list(benchmark.ops), help="default: all")
    add("--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: all that the op has")
    slow = f" (and {', '.join(benchmark.not_quick)}, with --quick)" if benchmark.not_quick else ""
    default = f"default: all but {', '.join(benchmark.on_request)}{slow}"
    add("--provider", nargs="+", choices=benchmark.provider_names, help=default)
    add("--quick", action="store_true", help="small, few rounds, no compiling: whether it runs")
    add("--json", type=_target(".json"), metavar="FILE.json", help="write the report")
    add("--plot", type=_target(".png"), metavar="FILE.png", help="draw the bandwidths of what was timed")
    example = next(iter(benchmark.shapes.values()))
    defaults = "; ".join(f"{kind}: {shape}" for kind, shape in benchmark.shapes.items())
    add("--shape", metavar=str(example), help=f"{benchmark.letters} (default: {defaults})")
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


def _publish(report: Report, options: argparse.Namespace, *extra: str) -> int:
    """Print the report, extra paragraphs below its table, and write what --json and --plot ask for."""
    print(*filter(None, (machine.line(report.machine), table(report), *extra)), sep="\n\n")
    if options.json:
        write_json(options.json, vars(report))
    if options.plot and report.rows:
        plot(options.plot, report)
    return 1 if report.refused else 0
