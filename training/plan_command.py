"""`--plan` of the command: its flags, and a plan as a table."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.plan import BYTES_PER_TOKEN, PARTS, ROOM, Machine, Plan, plan_run
from training.recipe import Recipe

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of ``--plan``."""
    group = parser.add_argument_group("planning")
    group.add_argument("--plan", action="store_true", help="print what the run will take, and do nothing else")
    group.add_argument("--devices", type=int, metavar="N", help="plan for so many devices (default: 1)")
    group.add_argument(
        "--device-memory", metavar="SIZE", help="of one device, such as 80GiB: warn where it is exceeded"
    )
    group.add_argument("--throughput", type=float, metavar="BYTES", help="training bytes a second of one device")
    group.add_argument("--mfu", type=float, metavar="SHARE", help="share of --peak-tflops that a device reaches")
    group.add_argument("--peak-tflops", type=float, metavar="N", help="10^12 operations a second of one device")
    group.add_argument("--bytes-per-token", type=float, metavar="N", help=f"of the text (default: {BYTES_PER_TOKEN})")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")


def run_command(recipe: Recipe, names: Sequence[str], options: argparse.Namespace) -> bool:
    """Print a plan if the flags of :func:`add_flags` ask for one, and say whether they did.

    Raises:
        UserError: flags that contradict each other, make no sense or need ``--plan``; what :func:`plan_run` refuses.
    """
    for name in ("devices", "device_memory", "throughput", "mfu", "peak_tflops", "bytes_per_token", "json"):
        if not options.plan and getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --plan: add --plan, or leave it out")
    if not options.plan:
        return False
    plan = plan_run(recipe, names, _machine(options))
    print(table(plan))
    if options.json:
        options.json.write_text(json.dumps(as_dict(plan), indent=1) + "\n")
    return True


def _machine(options: argparse.Namespace) -> Machine:
    for name in ("devices", "throughput", "mfu", "peak_tflops", "bytes_per_token"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if options.throughput is not None and options.mfu is not None:
        raise UserError("--throughput and --mfu both tell the speed: give one of them")
    if (options.mfu is None) != (options.peak_tflops is None):
        raise UserError("--mfu is a share of --peak-tflops: give both or neither")
    if options.mfu is not None and options.mfu > 1:
        raise UserError(f"--mfu is a share in (0, 1], got {options.mfu}")
    return Machine(
        options.devices or 1,
        None if options.device_memory is None else parse_size(options.device_memory),
        options.throughput,
        options.mfu,
        None if options.peak_tflops is None else options.peak_tflops * 1e12,
        options.bytes_per_token or BYTES_PER_TOKEN,
    )


def parse_size(text: str) -> int:
    """Bytes of ``80GiB`` or ``80GB``.

    Raises:
        UserError: anything else, or not positive.
    """
    unit = next((unit for unit in UNITS if text.endswith(unit)), None)
    try:
        size = float(text.removesuffix(unit)) * UNITS[unit] if unit else 0.0
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise UserError(f"a size is a positive number with a unit, such as 80GiB or 80GB; got {text!r}")
    return int(size)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan in plain numbers, for JSON: bytes, seconds, operations."""
    return {
        "recipe": plan.recipe.name,
        "machine": dataclasses.asdict(plan.machine),
        "teacher_parameters": plan.teacher,
        "stages": [{**dataclasses.asdict(s), "total_memory": s.total_memory} for s in plan.stages],
        "fits": plan.fits,
        "fixes": plan.fixes,
    }


def table(plan: Plan) -> str:
    """The plan for people: a line a stage, what it was reckoned with, and a warning where it will not fit."""
    work = [["stage", "parameters", "trained", "bytes", "steps", "batch", "PFLOP/step", "time"]]
    memory = [["GiB a device", *PARTS, "sum"]]
    for stage in plan.stages:
        work.append(
            [
                stage.name,
                _millions(stage.parameters),
                _millions(stage.trained),
                "-" if stage.bytes is None else f"{stage.bytes / 1e9:.3g} G",
                "-" if stage.steps is None else f"{stage.steps}",
                f"{plan.machine.devices} x {stage.accumulation} x {stage.batch_bytes}",
                f"{stage.flops / 1e15:.3g}",
                _duration(stage.seconds),
            ]
        )
        sizes = [*stage.memory.values(), stage.total_memory]
        memory.append([stage.name, *(f"{size / 2**30:.2f}" for size in sizes)])
    times = [stage.seconds for stage in plan.stages]
    total = None if None in times else sum(seconds for seconds in times if seconds is not None)
    work.append(["all", "", "", "", "", "", "", _duration(total)])
    return "\n".join([_reckoned_with(plan), "", _align(work), "", _align(memory), "", _verdict(plan)])


def _reckoned_with(plan: Plan) -> str:
    machine, parallel = plan.machine, plan.recipe.parallel
    group = parallel.shard or machine.devices
    if machine.throughput is not None:
        speed = f"time from {machine.throughput:g} bytes/s a device, as given"
    elif machine.mfu is not None and machine.peak is not None:
        speed = f"time from an assumed {machine.mfu:.0%} of {machine.peak / 1e12:g} TFLOP/s a device: nothing measured"
    else:
        speed = "no time: give --throughput, or --mfu with --peak-tflops"
    kept = "with" if parallel.checkpoint_activations else "without"
    return (
        f"{plan.recipe.name}: {machine.devices} devices, parameters cut over {group}, {kept} activation checkpointing\n"
        f"teacher {_millions(plan.teacher)}; {machine.bytes_per_token:g} bytes a token (assumed); {speed}"
    )


def _verdict(plan: Plan) -> str:
    limit = plan.machine.memory
    if limit is None:
        return "Give --device-memory to learn whether it fits."
    allowed = f"{1 - ROOM:.0%} of {limit / 2**30:.4g} GiB"
    if plan.fits:
        return f"It fits in {allowed}."
    over = ", ".join(stage.name for stage in plan.stages if stage.total_memory > (1 - ROOM) * limit)
    fix = " or ".join(plan.fixes)
    advice = f"it would with {fix}" if fix else "combine more devices, checkpoint_activations and a smaller batch_bytes"
    return f"WARNING: stage {over} will not fit in {allowed}: {advice}."


def _align(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
