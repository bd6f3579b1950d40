"""Where a training step's time goes: ``python benchmarks/profile_step.py --run runs/quickstart``, on an idle machine.

For each stage of a finished run, from the model that the stage began with: the time of a step, the share of it that
matrix products, the packed kernels, attention, the optimizer and all else take, and the share that the stage's FLOPs
would take at the rate of a large matrix product, which is the floor.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, machine
from benchmarks.report import aligned
from bytekernels.files import write_json
from training import loop, parallel
from training.optimizer import make_optimizer
from training.recipe import recipe_from
from training.run import Run
from training.stages import STAGES

GROUPS = ("matrix products", "packed kernels", "attention", "all else", "optimizer")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


def group_of(op: str) -> str:
    """The group that an op's own time belongs to."""
    if op in PRODUCTS:
        return "matrix products"
    if op.startswith("bytekernels::"):
        return "packed kernels"
    return "attention" if "scaled_dot_product" in op else "all else"


def profile_stage(run: Run, name: str, steps: int) -> dict[str, float]:
    """A stage's milliseconds a step, bytes a second, and shares of the step's time by group and at the floor."""
    stage, recipe = STAGES[name], run.recipe.stage[name]
    context = run.context(name, run.student_before(name))
    learner = run.learner(stage, context)
    named = [(key, parameter) for key, parameter in context.model.named_parameters() if parameter.requires_grad]
    batches, accumulation = run.batches(stage, recipe)
    mover = make_optimizer(named, run.recipe.optimizer, recipe)
    learner.train()
    own: Counter[str] = Counter()  # seconds by group
    read = 0
    for number in range(-1, steps):  # the first is to warm up
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            sums = loop.accumulate(learner, partial(learner, stage.objective), batches, accumulation, run.precision())
        began = time.perf_counter()
        loop.finish_step(sums, named, mover, 0.0, 1.0, run.ranks, seconds=0.0, stop=False)
        if number < 0:
            continue
        own["optimizer"] += time.perf_counter() - began
        read += sums.num_bytes
        for event in trace.key_averages():
            own[group_of(event.key)] += event.self_cpu_time_total / 1e6
    whole = sum(own.values())  # without what profiling itself takes
    shares = {group: own[group] / whole for group in GROUPS}
    floor = run.flops_per_byte(stage, context) * read / run.peak.flops
    return {"ms a step": 1e3 * whole / steps, "bytes/s": read / whole, **shares, "floor": floor / whole}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="profile_step.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run that has finished")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="of its teacher and text")
    parser.add_argument("--steps", type=int, default=5, help="of each stage")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    run = Run(
        recipe_from(json.loads((options.run / "recipe.json").read_text())),
        options.run,
        options.cache,
        parallel.start("cpu"),
    )
    run.prepare()
    rows = {name: profile_stage(run, name, options.steps) for name in run.recipe.order}
    columns = list(next(iter(rows.values())))
    cells = [["stage", *columns]]
    for name, row in rows.items():
        plain = [f"{row[column]:.0f}" for column in columns[:2]]
        cells.append([name, *plain, *(f"{row[column]:.0%}" for column in columns[2:])])
    facts = machine.facts(run.ranks.device, harness.copy_bandwidth(run.ranks.device, harness.QUICK))
    print("\n".join(aligned(cells, left=1)), f"\nfloor at {run.peak}", machine.line(facts), sep="\n")
    if options.json:
        write_json(options.json, {"machine": facts, "peak": str(run.peak), "steps": options.steps, "stages": rows})
    return 0


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    sys.exit(main())
