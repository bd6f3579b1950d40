"""What a run will take: parameters, steps, memory of each device and time, told without a device, weights or text.

Memory of one device, with the parameters cut over ``s`` devices (``parallel.shard``; 0 for all):

- masters: all of the student in fp32, 1/s of it. Frozen parts have masters too.
- weights: copies that are computed with. With s > 1 FSDP2 gathers: the largest block and the next one ahead of its
  turn in the dtype of the computation, and, for the whole step, what lies in no block (embeddings, bridges, router,
  heads) in fp32 beside its copy in the dtype of the computation. With s = 1 autocast's copies of all parameters. Then
  the teacher, frozen, in the dtype of the computation: 1/s of it, and gathered in the same way where the stage runs it.
- gradients: fp32, of trained parameters alone: 1/s of them, and with s > 1 those of what lies in no block and of the
  largest block before they are summed up.
- optimizer: fp32, of trained parameters alone, 1/s of them: two moments with AdamW, one of a matrix with Muon.
- activations: what autograd saves on the largest batch, read off the model's own modules on the meta device
  (:mod:`training.activations`), and twice the widest product's output for what is under way. With checkpointing, the
  blocks' inputs and one block's inside.
- logits: of :func:`bytekernels.linear_kl`, at one time three fp32 and one of the computation's dtype for each of its
  rows and tokens of the vocabulary, and the head's gradient in fp32; of the byte-wise loss, what autograd saves of
  [T, 512], and the logits, their fp32 copy and its gradient.

Left out: the device's own context, NCCL's buffers, workspaces of kernels, fragmentation. ROOM of a device is left for
them. Sequences are taken to be whole windows, and chunks to be as many as tokens, one for so many bytes.
"""

import argparse
import dataclasses
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

import bytekernels
from models import ByteLM, ByteLMConfig
from models.byte_lm import JOINT, core_settings
from training.activations import Activations, activations
from training.errors import UserError
from training.flops import Rows, Sizes, stage_flops
from training.muon import Muon
from training.optimizer import make_optimizer
from training.parallel import blocks_of
from training.recipe import Recipe, StageRecipe, TeacherConfig, TeacherRecipe, batch_sizes
from training.stages import STAGES

ROOM = 0.1
BYTES_PER_TOKEN = 4.5
PARTS = ("masters", "weights", "gradients", "optimizer", "activations", "logits")
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        devices: their number.
        memory: bytes of one; None where it is not known.
        throughput: training bytes that one device takes a second, whatever the stage; or
        mfu: the share of its peak that it reaches; or neither, and no times are told.
        peak: operations a second of one device, which mfu is a share of.
        bytes_per_token: of the text, with the teacher's tokenizer.
    """

    devices: int = 1
    memory: int | None = None
    throughput: float | None = None
    mfu: float | None = None
    peak: float | None = None
    bytes_per_token: float = BYTES_PER_TOKEN


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        name: of the stage.
        parameters, trained: of the student, the token head among them.
        batch_bytes: of one forward pass on one device.
        accumulation: forward passes in an optimizer step, on each device.
        steps: optimizer steps; None where the stage is measured in seconds and the throughput is not known.
        bytes: training bytes, likewise.
        flops: of one optimizer step on all devices.
        seconds: its time; None where it is not known.
        memory: bytes of one device, by part.
    """

    name: str
    parameters: int
    trained: int
    batch_bytes: int
    accumulation: int
    steps: int | None
    bytes: float | None
    flops: float
    seconds: float | None
    memory: dict[str, int]

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """A run on a machine.

    Attributes:
        recipe: of the run.
        machine: what it runs on.
        teacher: the teacher's parameters.
        stages: those that are planned.
        fixes: single changes of the recipe or the machine by which all of them would fit, where they don't.
    """

    recipe: Recipe
    machine: Machine
    teacher: int
    stages: list[StagePlan]
    fixes: list[str]

    @property
    def fits(self) -> bool:
        """Whether every stage leaves ROOM of a device's memory free (True where that is not known)."""
        limit = self.machine.memory
        return limit is None or all(stage.total_memory <= (1 - ROOM) * limit for stage in self.stages)


def plan_run(recipe: Recipe, names: Sequence[str], machine: Machine) -> Plan:
    """Plan stages of a recipe.

    Args:
        recipe: of the run.
        names: of its stages.
        machine: what it is to run on.

    Raises:
        UserError: nothing tells the teacher's sizes, or the devices cannot be grouped as the recipe has it.
    """
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(teacher_config(recipe.teacher))
        config = ByteLMConfig(core=core_settings(teacher), **dataclasses.asdict(recipe.model))
        model = ByteLM(config)
    planner = _Planner(names, model, teacher, Sizes.of(config))
    plan = planner.plan(recipe, machine)
    return plan if plan.fits else dataclasses.replace(plan, fixes=list(planner.fixes(recipe, machine)))


class _Planner:
    """Plans the same stages and models for this recipe and that machine.

    Args:
        names: of the stages.
        model, teacher: on the meta device.
        sizes: of the model.
    """

    def __init__(self, names: Sequence[str], model: ByteLM, teacher: PreTrainedModel, sizes: Sizes) -> None:
        self.names, self.model, self.teacher, self.sizes = names, model, teacher, sizes
        self._kept: dict[str, tuple[Rows, Activations]] = {}  # they grow with the batch: one reading does for all

    def plan(self, recipe: Recipe, machine: Machine) -> Plan:
        group = recipe.parallel.shard or machine.devices
        if machine.devices % group:
            raise UserError(
                f"parallel.shard={group} does not divide the {machine.devices} devices: use a divisor, or 0 for all"
            )
        stages = [self._stage(recipe, name, machine) for name in self.names]
        return Plan(recipe, machine, _count(self.teacher), stages, [])

    def fixes(self, recipe: Recipe, machine: Machine) -> Iterator[str]:
        """Single changes by which the run fits, in words."""
        parallel, data = recipe.parallel, recipe.data
        if not parallel.checkpoint_activations:
            other = dataclasses.replace(recipe, parallel=dataclasses.replace(parallel, checkpoint_activations=True))
            if self.plan(other, machine).fits:
                yield "parallel.checkpoint_activations=true"
        size = max(batch_sizes(data, recipe.stage_recipe(name), machine.devices)[0] for name in self.names)
        while (size := size // 2) >= data.window:
            other = dataclasses.replace(recipe, data=dataclasses.replace(data, batch_bytes=size))
            if self.plan(other, machine).fits:
                yield f"data.batch_bytes={size}"
                break
        for factor in (2, 4, 8):
            more = dataclasses.replace(machine, devices=factor * machine.devices)
            if self.plan(recipe, more).fits:
                yield f"{more.devices} devices"
                break

    def _stage(self, recipe: Recipe, name: str, machine: Machine) -> StagePlan:
        stage, data = recipe.stage_recipe(name), recipe.data
        batch_bytes, accumulation = batch_sizes(data, stage, machine.devices)
        rows = Rows(batch_bytes, round(batch_bytes / machine.bytes_per_token), max(1, batch_bytes // data.window))
        flops = accumulation * stage_flops(self.sizes, name, rows, distill=_distills(name, stage)).total
        step_bytes = batch_bytes * accumulation * machine.devices
        rate = _rate(machine, step_bytes, flops)
        if stage.bytes is None:
            num_bytes, seconds = (None if rate is None else (stage.seconds or 0) * rate), stage.seconds
        else:
            num_bytes, seconds = float(stage.bytes), None if rate is None else stage.bytes / rate
        return StagePlan(
            name,
            _count(self.model),
            sum(parameter.numel() for _, parameter in STAGES[name].freeze_others(self.model)),
            batch_bytes,
            accumulation,
            None if num_bytes is None else math.ceil(num_bytes / step_bytes),
            num_bytes,
            flops * machine.devices,
            seconds,
            self._memory(recipe, name, machine, rows),
        )

    def _memory(self, recipe: Recipe, name: str, machine: Machine, rows: Rows) -> dict[str, int]:
        model, teacher, stage = self.model, self.teacher, recipe.stage_recipe(name)
        group = recipe.parallel.shard or machine.devices
        dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
        narrow, token_kl = dtype.itemsize, name == "1.2" or _distills(name, stage)
        trained = STAGES[name].freeze_others(model)
        kept = self._activations(name, rows, dtype, _distills(name, stage))
        moments = sum(
            parameter.numel() * (1 if isinstance(part, Muon) else 2)
            for part in make_optimizer(trained, recipe.optimizer, stage).parts
            for one in part.param_groups
            for parameter in one["params"]
        )
        copied = narrow < 4  # fp32 masters are computed with as they are
        gradients = 4 * _count(model, trained_only=True) / group
        weights = narrow * _count(teacher) / group
        if group == 1:
            weights += narrow * _count(model) * copied
        else:
            root, block = _groups(model)
            gradients += 4 * sum(_groups(model, trained_only=True))
            weights += (4 + narrow * copied) * root + 2 * narrow * block
            if token_kl or name == "1.1":
                root, block = _groups(teacher)
                weights += narrow * (root + 2 * block * token_kl)
        sizes = {
            "masters": 4 * _count(model) / group,
            "weights": weights,
            "gradients": gradients,
            "optimizer": 4 * moments / group,
            "activations": kept.peak(recipe.parallel.checkpoint_activations),
            "logits": _logits(model.config, kept, rows, narrow, token_kl),
        }
        return {part: round(sizes[part]) for part in PARTS}

    def _activations(self, name: str, rows: Rows, dtype: torch.dtype, distill: bool) -> Activations:
        if name not in self._kept:
            self._kept[name] = rows, activations(self.model, STAGES[name], rows, dtype, distill=distill)
        read_at, kept = self._kept[name]
        return kept.scaled(rows.bytes / read_at.bytes)


def _distills(name: str, stage: StageRecipe) -> bool:
    return name == "2.2" and stage.distill_weight > 0


def _rate(machine: Machine, step_bytes: int, flops: float) -> float | None:
    """Training bytes a second, all devices together; ``flops`` are one device's in an optimizer step."""
    if machine.throughput is not None:
        return machine.throughput * machine.devices
    if machine.mfu is None or machine.peak is None:
        return None
    return step_bytes * machine.mfu * machine.peak / flops


def _logits(config: ByteLMConfig, kept: Activations, rows: Rows, narrow: int, token_kl: bool) -> int:
    joint = JOINT + 256 * config.draft_head
    of_bytes = kept.logits + (rows.bytes * joint * (narrow + 4 + 4) if kept.logits else 0)
    if not token_kl:
        return of_bytes
    chunk_rows = inspect.signature(bytekernels.linear_kl).parameters["chunk_rows"].default
    core = config.core_config()
    of_tokens = (
        min(chunk_rows, rows.chunks) * core.vocab_size * (3 * 4 + narrow) + 4 * core.vocab_size * core.hidden_size
    )
    return of_bytes + of_tokens


def _groups(model: nn.Module, *, trained_only: bool = False) -> tuple[int, int]:
    """Parameters that lie in no block, and those of the largest block."""
    blocks = [_count(block, trained_only) for block in blocks_of(model)]
    return _count(model, trained_only) - sum(blocks), max(blocks, default=0)


def _count(module: nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


# ------------------------------------------------------------------------------------------------------ the teacher


def teacher_config(recipe: TeacherRecipe) -> PreTrainedConfig:
    """The teacher's configuration: its folder's own, else the recipe's ``[teacher.config]``, else the small Llama's.

    Raises:
        UserError: none of them is there, the folder's cannot be read, or it says otherwise than the recipe.
    """
    if recipe.path is None:
        sizes = {"vocab_size": recipe.vocab_size, **recipe.sizes}
        return LlamaConfig(**sizes, max_position_embeddings=2048, tie_word_embeddings=True)
    folder = Path(recipe.path).expanduser()
    if (folder / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot read {folder / 'config.json'}: {str(error).splitlines()[0]}") from error
        check_teacher(recipe, config)
        return config
    if recipe.config is None:
        raise UserError(
            f"nothing tells the sizes of the teacher at {recipe.path}: give a folder with its config.json, or its "
            "numbers in the recipe's [teacher.config]"
        )
    settings = dataclasses.asdict(recipe.config)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except ValueError as error:
        raise UserError(f"teacher.config: {str(error).splitlines()[0]}") from error


def check_teacher(recipe: TeacherRecipe, config: PreTrainedConfig) -> None:
    """Refuse a teacher of other sizes than the recipe's ``[teacher.config]``, if it has one.

    Raises:
        UserError: naming the first number that differs.
    """
    if recipe.config is None:
        return
    for field in dataclasses.fields(TeacherConfig):
        wanted, found = getattr(recipe.config, field.name), getattr(config, field.name, None)
        if field.name == "head_dim" and found is None:
            found = config.hidden_size // config.num_attention_heads
        if wanted != found:
            raise UserError(
                f"the recipe's teacher.config.{field.name} is {wanted!r}, but the teacher at {recipe.path} has "
                f"{found!r}: correct the recipe, or give the model that it is for"
            )


# --------------------------------------------------------------------------------------------------- the command


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
