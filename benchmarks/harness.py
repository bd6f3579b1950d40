"""How the project's benchmarks measure, and the form in which they report.

A benchmark is a list of :class:`Case` (an op, its arguments, its float64 reference) and a mapping of providers.
:func:`run` holds every provider to the reference, outputs and all gradients, and refuses to time one that fails; times
the others in turn, so that a drift of the machine meets them all alike; and measures the memory that a call takes.

Times are medians of single calls. On a CUDA device they are taken with events, after the L2 cache has been emptied; on
the CPU with the wall clock, and arguments smaller than the last cache are found there. ``forward`` runs without
autograd, ``backward`` on a graph that is kept, ``both`` is forward with autograd and backward.

Bandwidth is compulsory traffic (``roofline.py`` of the op's room) over the median, and is held against that of a large
copy, bytes read and written, with the same threads and device in the same run. On the CPU the copy's target is in
memory already, while an op's outputs are new pages that the system clears first.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bytekernels.roofline import Work
from bytekernels.testing import assert_close

PASSES = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 2**20

Function = Callable[..., dict[str, Tensor]]  # an op: arguments by name to outputs by name


@dataclass(frozen=True)
class Provider:
    """One way of computing some ops.

    Attributes:
        functions: op to function.
        settings: entered around every call, forward and backward.
    """

    functions: Mapping[str, Function]
    settings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Unavailable:
    """A provider that can't run on this machine, and why."""

    reason: str


@dataclass(frozen=True)
class Case:
    """An op and what it is called with.

    Attributes:
        op: its name in the providers' functions.
        shape: how the row names it, such as ``T=65536,D=512``.
        dtype: whose tolerance applies (``bytekernels.testing.TOLERANCE``).
        arguments: by name. Tensors that require a gradient are differentiated; other values are pytrees.
        reference: the truth, called with every floating-point tensor in float64.
        work: what each of :data:`PASSES` must do at least.
    """

    op: str
    shape: str
    dtype: torch.dtype
    arguments: Mapping[str, Any]
    reference: Provider
    work: Mapping[str, Work]


@dataclass(frozen=True)
class Budget:
    """How long a group of providers is timed: at least ``rounds`` rounds, then until ``seconds`` for each of them.

    In a round each provider is called once.
    """

    warmup: int = 2
    rounds: int = 7
    seconds: float = 1.0
    most: int = 500


QUICK = Budget(warmup=1, rounds=3, seconds=0.02)


@dataclass(frozen=True)
class Ceilings:
    """Rates measured in the same run.

    Attributes:
        copy: bytes per second of a copy, read and written.
        flops: of the unit that does the arithmetic, or None where the ops move too many bytes for it to matter.
    """

    copy: float
    flops: float | None = None


@dataclass
class Report:
    """What a run came to: the machine, a row for each op, pass and provider timed, and what was not timed, with why."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Truth:
    """A case's outputs and gradients in float64, and the output gradients that they were taken with."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    cotangents: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> "Truth":
        arguments = {
            name: value.detach().double().requires_grad_()
            if _is_differentiated(value)
            else pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)
            for name, value in case.arguments.items()
        }
        with case.reference.settings():
            outputs = case.reference.functions[case.op](**arguments)
            cotangents = {}
            for name, output in outputs.items():
                if output.requires_grad:
                    generator = torch.Generator(output.device).manual_seed(seed)
                    noise = torch.randn(output.shape, generator=generator, device=output.device)
                    cotangents[name] = noise.to(case.dtype).double()
            gradients = _gradients(outputs, arguments, cotangents)
        return cls({name: output.detach() for name, output in outputs.items()}, gradients, cotangents)


def _is_differentiated(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _gradients(
    outputs: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    cotangents: Mapping[str, Tensor],
    *,
    retain_graph: bool = False,
) -> dict[str, Tensor]:
    names = [name for name, value in arguments.items() if _is_differentiated(value)]
    gradients = torch.autograd.grad(
        [outputs[name] for name in cotangents],
        [arguments[name] for name in names],
        list(cotangents.values()),
        retain_graph=retain_graph,
    )
    return dict(zip(names, gradients, strict=True))


def _typed(cotangents: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: cotangent.to(outputs[name].dtype) for name, cotangent in cotangents.items()}


def check(case: Case, provider: Provider, truth: Truth) -> None:
    """Hold a provider to the truth: floating-point outputs and gradients by tolerance, the others exactly.

    Raises:
        AssertionError: what is wrong, and by how much. Whatever else the provider raises passes through.
    """
    with provider.settings():
        outputs = provider.functions[case.op](**case.arguments)
        missing = sorted(set(truth.outputs) - set(outputs))
        assert not missing, f"no output {', '.join(missing)}"
        for name, expected in truth.outputs.items():
            if expected.is_floating_point():
                assert_close(outputs[name], expected, dtype=case.dtype, what=name)
            else:
                _assert_equal(outputs[name], expected, name)
        gradients = _gradients(outputs, case.arguments, _typed(truth.cotangents, outputs))
    for name, expected in truth.gradients.items():
        assert_close(gradients[name], expected, dtype=case.dtype, what=f"gradient of {name}")


def _assert_equal(value: Tensor, expected: Tensor, name: str) -> None:
    assert value.shape == expected.shape, f"{name}: shape {list(value.shape)}, expected {list(expected.shape)}"
    wrong = int((value.long() != expected.long()).sum())
    assert not wrong, f"{name}: {wrong} of {expected.numel()} values differ"


def call_of(case: Case, provider: Provider, which: str, cotangents: Mapping[str, Tensor]) -> Callable[[], Any]:
    """A call without arguments that runs one of :data:`PASSES` once."""
    function, settings, arguments = provider.functions[case.op], provider.settings, case.arguments

    if which == "forward":

        def forward() -> Any:
            with torch.no_grad(), settings():
                return function(**arguments)

        return forward

    with settings():
        kept = function(**arguments)
    given = _typed(cotangents, kept)  # once, so that no call pays for it

    def backward() -> Any:
        with settings():
            return _gradients(kept, arguments, given, retain_graph=True)

    def both() -> Any:
        with settings():
            return _gradients(function(**arguments), arguments, given)

    return backward if which == "backward" else both


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, budget: Budget
) -> dict[str, list[float]]:
    """Milliseconds of single calls, round by round; every other round in reverse order."""
    clock = _cuda_clock(device) if device.type == "cuda" else _wall_clock
    for _ in range(budget.warmup):
        for call in calls.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    begin, seconds = time.perf_counter(), budget.seconds * len(calls)
    for done in range(budget.most):
        if done >= budget.rounds and time.perf_counter() - begin >= seconds:
            break
        for name in names:
            samples[name].append(clock(calls[name]))
        names.reverse()
    return samples


def _wall_clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    result = call()  # kept past the clock: giving its memory back is not the call's time
    elapsed = time.perf_counter() - begin
    del result
    return 1e3 * elapsed


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(2 * cache, 256 * MIB), dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(call: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            flush.zero_()
            start.record()
            result = call()
            end.record()
            end.synchronize()
        del result
        return start.elapsed_time(end)

    return clock


def synchronized(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as a clock on the host must see it: on a CUDA device, with the wait for its end."""
    if device.type != "cuda":
        return call

    def until_done() -> Any:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return until_done


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the values that 20 % and 80 % of the samples lie below, interpolated."""
    low, median, high = numpy.percentile(samples, (20, 50, 80))
    return float(median), float(low), float(high)


def copy_bandwidth(device: torch.device, budget: Budget) -> float:
    """Bytes per second, read and written, of a copy far larger than any cache: 256 MiB on the CPU, 1 GiB on a GPU."""
    source = torch.rand((1024 if device.type == "cuda" else 256) * MIB // 4, device=device)
    target = source.clone()
    samples = time_in_turn({"copy": lambda: target.copy_(source)}, device, budget)["copy"]
    return 2 * source.nbytes / (statistics.median(samples) / 1e3)


def peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that a call takes at its peak on top of what was there before it, its results included.

    On a CUDA device: torch's allocator, where every kernel of ours gets its memory. On the CPU: the resident memory of
    the process (its high-water mark, reset through /proc/self/clear_refs), so the working memory of native code and
    of any library counts as tensors do. Resident memory comes in pages, and the C library keeps small blocks that were
    freed: trust it from tens of MiB up. None where the system has no such file.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        with contextlib.suppress(AttributeError, OSError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        before = _high_water_mark()
        result = call()
        peak = _high_water_mark()
    del result
    return (peak - before) / MIB


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def run(
    cases: Iterable[Case],
    providers: Mapping[str, Provider | Unavailable],
    passes: Sequence[str],
    device: torch.device,
    budget: Budget,
) -> Report:
    """Check, time and measure every case with every provider that has its op."""
    ceilings = Ceilings(copy_bandwidth(device, budget))
    report = Report(machine(device, ceilings))
    report.skipped += [
        {"provider": name, "reason": provider.reason}
        for name, provider in providers.items()
        if isinstance(provider, Unavailable)
    ]
    present = {name: provider for name, provider in providers.items() if isinstance(provider, Provider)}
    for case in cases:
        print(f"measuring {case.op} ...", file=sys.stderr, flush=True)
        measure(case, present, passes, device, budget, ceilings, report)
    return report


def measure(
    case: Case,
    providers: Mapping[str, Provider],
    passes: Sequence[str],
    device: torch.device,
    budget: Budget,
    ceilings: Ceilings,
    report: Report,
) -> None:
    """Add one case's rows to the report, and the providers that were refused."""
    truth = Truth.of(case)
    sound = {}
    for name, provider in providers.items():
        if case.op not in provider.functions:
            continue
        try:
            check(case, provider, truth)
        except Exception as error:
            report.refused.append({"op": case.op, "provider": name, "reason": _reason(error)})
        else:
            sound[name] = provider
    cotangents = truth.cotangents
    del truth
    for which in passes:
        calls = {}
        for name, provider in sound.items():
            try:
                call = call_of(case, provider, which, cotangents)
                call()
            except Exception as error:  # compiling without autograd may fail where it had not failed before
                report.refused.append({"op": case.op, "provider": name, "reason": f"{which}: {_reason(error)}"})
            else:
                calls[name] = call
        samples = time_in_turn(calls, device, budget)
        for name, call in calls.items():
            report.rows.append(row(case, which, name, samples[name], peak_memory(call, device), ceilings))


def _reason(error: Exception) -> str:
    message = (str(error).strip() or repr(error)).splitlines()[0]
    return message if isinstance(error, AssertionError) else f"{type(error).__name__}: {message}"


def row(
    case: Case, which: str, provider: str, samples: Sequence[float], peak_mib: float | None, ceilings: Ceilings
) -> dict[str, Any]:
    """One row of the report.

    ``gb_per_s`` is compulsory bytes over the median, ``copy_fraction`` its share of the copy's bandwidth, and
    ``roofline_fraction`` the roofline's time over the median.
    """
    work = case.work[which]
    median, low, high = percentiles(samples)
    rate = work.bytes / (median / 1e3)
    return {
        "op": case.op,
        "pass": which,
        "provider": provider,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "median_ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "gb_per_s": rate / 1e9,
        "copy_fraction": rate / ceilings.copy,
        "roofline_fraction": work.seconds(ceilings.copy, ceilings.flops) / (median / 1e3),
        "peak_mib": peak_mib,
    }


def machine(device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    return {
        **(_gpu(device) if device.type == "cuda" else _cpu()),
        "copy_gb_per_s": ceilings.copy / 1e9,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        **_commit(),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """:func:`machine`'s facts in words."""
    if facts["kind"] == "cuda":
        hardware = f"{facts['device']}, {facts['clocks']}, driver {facts['driver']}"
    else:
        hardware = f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads"
    commit = facts["commit"] + (" with changes" if facts["dirty"] else "")
    return (
        f"{hardware}; copies at {facts['copy_gb_per_s']:.1f} GB/s\n{facts['system']}, Python {facts['python']}, "
        f"torch {facts['torch']}, triton {facts['triton'] or 'none'}; commit {commit}"
    )


def version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"kind": "cpu", "device": name, "cores": cores, "threads": torch.get_num_threads()}


def _gpu(device: torch.device) -> dict[str, Any]:
    """Name, clocks and driver. The clocks are read right after the copy's measurement, while they are still up."""
    properties = torch.cuda.get_device_properties(device)
    facts = {"kind": "cuda", "device": properties.name, "cuda": torch.version.cuda, "driver": "unknown"}
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        return {**facts, "clocks": "clocks unknown (pip install nvidia-ml-py)"}
    except pynvml.NVMLError as error:
        return {**facts, "clocks": f"clocks unknown ({error})"}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        clocks = []
        for name, kind in (("SM", pynvml.NVML_CLOCK_SM), ("memory", pynvml.NVML_CLOCK_MEM)):
            now = pynvml.nvmlDeviceGetClockInfo(handle, kind)
            clocks.append(f"{name} at {now} of {pynvml.nvmlDeviceGetMaxClockInfo(handle, kind)} MHz")
        return {**facts, "driver": pynvml.nvmlSystemGetDriverVersion(), "clocks": ", ".join(clocks)}
    except pynvml.NVMLError as error:
        return {**facts, "clocks": f"clocks unknown ({error})"}
    finally:
        pynvml.nvmlShutdown()


def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": False}


def table(report: Report) -> str:
    """The rows as aligned text, and below them what was refused or skipped."""
    eager = {(row["op"], row["pass"]): row["median_ms"] for row in report.rows if row["provider"] == "eager"}
    cells = [
        ["op", "pass", "provider", "median ms", "p20 - p80", "GB/s", "of copy", "of roofline", "speed-up", "peak MiB"]
    ]
    for row in report.rows:
        before = eager.get((row["op"], row["pass"]))
        cells.append(
            [
                row["op"],
                row["pass"],
                row["provider"],
                f"{row['median_ms']:.3f}",
                f"{row['p20_ms']:.3f} - {row['p80_ms']:.3f}",
                f"{row['gb_per_s']:.1f}",
                f"{row['copy_fraction']:.1%}",
                f"{row['roofline_fraction']:.1%}",
                "" if before is None else f"{before / row['median_ms']:.2f}x",
                "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
            ]
        )
    lines = aligned(cells, left=3)
    lines += [f"refused  {r['op']} by {r['provider']}: {r['reason']}" for r in report.refused]
    lines += [f"skipped  {s['provider']}: {s['reason']}" for s in report.skipped]
    return "\n".join(lines)


def aligned(cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table whose first row is its head; the first ``left`` columns are flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or not there; its folder is made if need be."""

    def dump(partial: Path) -> None:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")

    _write(path, dump)


def plot(path: Path, report: Report) -> None:
    """A PNG of the achieved bandwidth: a panel for each pass, a group of bars for each op, the copy as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    passes = [which for which in PASSES if any(row["pass"] == which for row in report.rows)]
    ops = list(dict.fromkeys(row["op"] for row in report.rows))
    names = list(dict.fromkeys(row["provider"] for row in report.rows))
    figure, axes = pyplot.subplots(1, len(passes), figsize=(4 * len(passes) + 1, 4), sharey=True, squeeze=False)
    for axis, which in zip(axes[0], passes, strict=True):
        for i, name in enumerate(names):
            rows = [row for row in report.rows if row["pass"] == which and row["provider"] == name]
            x = [ops.index(row["op"]) + (i - (len(names) - 1) / 2) * 0.8 / len(names) for row in rows]
            axis.bar(x, [row["gb_per_s"] for row in rows], 0.8 / len(names), label=name)
        axis.axhline(report.machine["copy_gb_per_s"], color="black", linestyle="--", linewidth=1, label="copy")
        axis.set_xticks(range(len(ops)), ops)
        axis.set_title(which)
    axes[0][0].set_ylabel("compulsory traffic / median time, GB/s")
    axes[0][-1].legend(fontsize="small")
    shapes = " | ".join(dict.fromkeys(f"{row['shape']}, {row['dtype']}" for row in report.rows))
    figure.suptitle(f"{report.machine['device']}: {shapes}", fontsize="medium")
    figure.tight_layout()
    _write(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))
    pyplot.close(figure)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        write(partial)
        partial.replace(path)


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
    print(*filter(None, (machine_line(report.machine), table(report), *extra)), sep="\n\n")
    if options.json:
        write_json(options.json, vars(report))
    if options.plot and report.rows:
        plot(options.plot, report)
    return 1 if report.refused else 0
