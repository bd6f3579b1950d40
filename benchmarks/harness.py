"""How the project's benchmarks measure.

A benchmark is a list of :class:`Case` (an op, its arguments, its float64 reference) and a mapping of providers.
:func:`run` holds every provider to the reference, outputs and all gradients, and refuses to time one that fails; times
the others in turn, so that a drift of the machine meets them all alike; and measures the memory that a call takes.

Times are medians of single calls. On a CUDA device they are taken with events, after the L2 cache has been emptied; on
the CPU with the wall clock, and arguments smaller than the last cache are found there. ``forward`` runs without
autograd, ``backward`` on a graph that is kept, ``both`` is forward with autograd and backward.
An op without gradients has the first of them alone.

Bandwidth is compulsory traffic (``roofline.py`` of the op's room) over the median, and is held against that of a large
copy, bytes read and written, with the same threads and device in the same run. On the CPU the copy's target is in
memory already, while an op's outputs are new pages that the system clears first. Where arithmetic counts, the roofline
also knows the rate of a large matrix product, measured in the same way.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import machine, memory
from benchmarks.report import Report
from bytekernels.roofline import Work
from bytekernels.testing import TOLERANCE, assert_close

Function = Callable[..., dict[str, Tensor]]  # an op: arguments by name to outputs by name


@dataclass(frozen=True)
class Provider:
    """One way of computing some ops.

    Attributes:
        functions: op to function.
        settings: entered around every call, forward and backward.
        prepare: op to what makes its arguments from the case's, before any clock runs; as they are where it is missing.
    """

    functions: Mapping[str, Function]
    settings: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    prepare: Mapping[str, Callable[..., dict[str, Any]]] = field(default_factory=dict)


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
        dtype: whose tolerance applies (``bytekernels.testing.TOLERANCE``); none to integers, which are exact.
        arguments: by name. Tensors that require a gradient are differentiated; other values are pytrees.
        reference: the truth, called with every floating-point tensor in float64.
        work: what each pass must do at least; a pass of ``report.PASSES`` that is not there, the op does not have.
        updated: names of tensors that the op changes in place.
        calls: how often a check calls the op in a row, each call on what the one before left; the last one's outputs
            count.
        chain: how many times the tolerance its errors may be: the number of ops in a row that round in between.
    """

    op: str
    shape: str
    dtype: torch.dtype
    arguments: Mapping[str, Any]
    reference: Provider
    work: Mapping[str, Work]
    updated: Sequence[str] = ()
    calls: int = 1
    chain: int = 1


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


@dataclass(frozen=True)
class Truth:
    """A case's outputs and gradients in float64, and the output gradients that they were taken with."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    cotangents: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> "Truth":
        wide = {
            name: value.detach().double().requires_grad_()
            if _is_differentiated(value)
            else pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)
            for name, value in case.arguments.items()
        }
        wide |= {name: wide[name].clone() for name in case.updated}
        arguments = _prepared(case, case.reference, wide)
        with case.reference.settings():
            outputs = _outputs(case, case.reference, arguments)
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
    if not names:
        return {}
    gradients = torch.autograd.grad(
        [outputs[name] for name in cotangents],
        [arguments[name] for name in names],
        list(cotangents.values()),
        retain_graph=retain_graph,
    )
    return dict(zip(names, gradients, strict=True))


def _arguments(case: Case, provider: Provider) -> dict[str, Any]:
    """The provider's own, with copies of what a call changes."""
    return _prepared(case, provider, {name: case.arguments[name].clone() for name in case.updated})


def _prepared(case: Case, provider: Provider, others: Mapping[str, Any]) -> dict[str, Any]:
    """What the provider makes of the case's arguments, with others in their place."""
    return provider.prepare.get(case.op, dict)(**{**case.arguments, **others})


def _outputs(case: Case, provider: Provider, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of the last of ``case.calls`` calls in a row."""
    for _ in range(case.calls - 1):
        provider.functions[case.op](**arguments)
    return provider.functions[case.op](**arguments)


def _typed(cotangents: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: cotangent.to(outputs[name].dtype) for name, cotangent in cotangents.items()}


def check(case: Case, provider: Provider, truth: Truth) -> None:
    """Hold a provider to the truth: floating-point outputs and gradients by tolerance, the others exactly.

    Raises:
        AssertionError: what is wrong, and by how much. Whatever else the provider raises passes through.
    """
    limit = case.chain * TOLERANCE.get(case.dtype, 0.0)
    arguments = _arguments(case, provider)
    with provider.settings():
        outputs = _outputs(case, provider, arguments)
        missing = sorted(set(truth.outputs) - set(outputs))
        assert not missing, f"no output {', '.join(missing)}"
        for name, expected in truth.outputs.items():
            if expected.is_floating_point():
                assert_close(outputs[name], expected, limit=limit, what=name)
            else:
                _assert_equal(outputs[name], expected, name)
        gradients = _gradients(outputs, arguments, _typed(truth.cotangents, outputs))
    for name, expected in truth.gradients.items():
        assert_close(gradients[name], expected, limit=limit, what=f"gradient of {name}")


def _assert_equal(value: Tensor, expected: Tensor, name: str) -> None:
    assert value.shape == expected.shape, f"{name}: shape {list(value.shape)}, expected {list(expected.shape)}"
    wrong = int((value != expected).sum())
    assert not wrong, f"{name}: {wrong} of {expected.numel()} values differ"


def call_of(case: Case, provider: Provider, which: str, cotangents: Mapping[str, Tensor]) -> Callable[[], Any]:
    """A call without arguments that runs one of ``report.PASSES`` once."""
    function, settings, arguments = provider.functions[case.op], provider.settings, _arguments(case, provider)

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
    flush = torch.empty(max(2 * cache, 256 * memory.MIB), dtype=torch.uint8, device=device)
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
    source = torch.rand((1024 if device.type == "cuda" else 256) * memory.MIB // 4, device=device)
    target = source.clone()
    samples = time_in_turn({"copy": lambda: target.copy_(source)}, device, budget)["copy"]
    return 2 * source.nbytes / (statistics.median(samples) / 1e3)


def matmul_rate(device: torch.device, dtype: torch.dtype, budget: Budget) -> float:
    """FLOPs per second of a square matrix product, 1024 wide on the CPU and 8192 on a GPU."""
    width = 8192 if device.type == "cuda" else 1024
    left = torch.randn(width, width, device=device).to(dtype)
    right = left.clone()
    samples = time_in_turn({"matmul": lambda: left @ right}, device, budget)["matmul"]
    return 2 * width**3 / (statistics.median(samples) / 1e3)


def run(
    cases: Iterable[Case],
    providers: Mapping[str, Provider | Unavailable],
    passes: Sequence[str],
    device: torch.device,
    budget: Budget,
    *,
    arithmetic: torch.dtype | None = None,
) -> Report:
    """Check, time and measure every case with every provider that has its op.

    ``arithmetic`` is the dtype in which the ops multiply, where the roofline is to count it.
    """
    flops = None if arithmetic is None else matmul_rate(device, arithmetic, budget)
    ceilings = Ceilings(copy_bandwidth(device, budget), flops)
    report = Report(machine.facts(device, ceilings.copy, ceilings.flops))
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
            _turn_away(report, case.op, name, error)
        else:
            sound[name] = provider
    cotangents = truth.cotangents
    del truth
    for which in (which for which in passes if which in case.work):
        calls = {}
        for name, provider in sound.items():
            try:
                call = call_of(case, provider, which, cotangents)
                call()
            except Exception as error:  # compiling without autograd may fail where it had not failed before
                _turn_away(report, case.op, name, error, f"{which}: ")
            else:
                calls[name] = call
        samples = time_in_turn(calls, device, budget)
        for name, call in calls.items():
            report.rows.append(row(case, which, name, samples[name], memory.peak(call, device), ceilings))


def _turn_away(report: Report, op: str, provider: str, error: Exception, where: str = "") -> None:
    """Say why a provider is not timed. Too little memory is the machine's fault, all else the provider's."""
    if isinstance(error, torch.OutOfMemoryError):
        report.skipped.append({"provider": provider, "reason": f"{where}{op} needs more memory than the device has"})
        return
    message = (str(error).strip() or repr(error)).splitlines()[0]
    reason = message if isinstance(error, AssertionError) else f"{type(error).__name__}: {message}"
    report.refused.append({"op": op, "provider": provider, "reason": where + reason})


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
