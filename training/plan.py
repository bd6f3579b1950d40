"""What a run will take: parameters, steps, memory of each device and time, told without a device, weights or text.

Memory of one device, with the parameters cut over ``s`` devices (``parallel.shard``; 0 for all):

- masters: all of the student in fp32, 1/s of it. Frozen parts have masters too.
- weights: copies that are computed with. With s > 1 FSDP2 gathers: the largest block and the next one ahead of its
  turn in the dtype of the computation, and, for the whole step, what lies in no block (embeddings, bridges, router,
  heads) in fp32 beside its copy in the dtype of the computation. With s = 1 autocast's copies of all parameters. Then
  the teacher, frozen, in the dtype of the computation: 1/s of it, and gathered in the same way where the stage runs it.
  Suffix features' table, whole.
- gradients: fp32, of trained parameters alone: 1/s of them, and with s > 1 those of what lies in no block and of the
  largest block before they are summed up.
- optimizer: fp32, of trained parameters alone, 1/s of them: two moments with AdamW, one of a matrix with Muon.
- activations: what autograd saves on the largest batch, read off the model's own modules on the meta device
  (:mod:`training.activations`), and twice the widest product's output for what is under way. With checkpointing, the
  blocks' inputs and one block's inside.
- logits: of :func:`bytekernels.linear_kl`, at one time three fp32 and one of the computation's dtype for each of its
  rows and tokens of the vocabulary, and the head's gradient in fp32; of the byte-wise loss, what autograd saves of
  [T, 512], and the logits, their fp32 copy and its gradient; with a marginal head three more of [T, 512] in fp32, and
  the token head's logits of as many chunks as are in memory at once.

Left out: the device's own context, NCCL's buffers, workspaces of kernels, fragmentation. ROOM of a device is left for
them. Sequences are taken to be whole windows, and chunks to be as many as tokens, one for so many bytes.
"""

import dataclasses
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import bytekernels
from models import ByteLM, ByteLMConfig
from models.byte_lm import JOINT, core_settings
from models.marginal_head import CHUNKS
from training.activations import Activations, activations
from training.errors import UserError
from training.flops import Extras, Rows, Sizes, stage_flops
from training.muon import Muon
from training.optimizer import make_optimizer
from training.parallel import blocks_of
from training.recipe import Recipe, TeacherConfig, TeacherRecipe, batch_sizes
from training.stages import STAGES
from training.teacher import small_config

ROOM = 0.1
BYTES_PER_TOKEN = 4.5
BYTES_PER_ENTRY = 7  # of a vocabulary
PARTS = ("masters", "weights", "gradients", "optimizer", "activations", "logits")


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
        vocabulary_bytes = BYTES_PER_ENTRY * teacher.config.get_text_config().vocab_size
        config = ByteLMConfig(core=core_settings(teacher), **recipe.model.settings(vocabulary_bytes))
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
        flops = accumulation * stage_flops(self.sizes, name, rows, Extras.of(name, stage)).total
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
        extras = Extras.of(name, stage)
        narrow, guided = dtype.itemsize, name in ("1.2", "joint") or extras.distill or extras.marginals
        trained = STAGES[name].freeze_others(model)
        kept = self._activations(name, rows, dtype, extras)
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
            if guided or name == "1.1":
                root, block = _groups(teacher)
                weights += narrow * (root + 2 * block * guided)
        weights += _buffers(model.encoder) * (2 if extras.anchor else 1)
        if extras.anchor:
            weights += self._anchor(group, narrow)
        sizes = {
            "masters": 4 * _count(model) / group,
            "weights": weights,
            "gradients": gradients,
            "optimizer": 4 * moments / group,
            "activations": kept.peak(recipe.parallel.checkpoint_activations),
            "logits": _logits(model.config, kept, rows, narrow, guided or extras.anchor),
        }
        return {part: round(sizes[part]) for part in PARTS}

    def _anchor(self, group: int, narrow: int) -> float:
        """Bytes of the frozen copy that an anchored stage is held against, in fp32, and of what is gathered of it."""
        parts = (self.model.encoder, self.model.core, self.model.token_head)
        held = 4 * sum(map(_count, parts)) / group
        if group == 1:
            return held
        groups = [_groups(part) for part in parts]
        return held + 4 * sum(root for root, _ in groups) + 2 * narrow * max(block for _, block in groups)

    def _activations(self, name: str, rows: Rows, dtype: torch.dtype, extras: Extras) -> Activations:
        if name not in self._kept:
            self._kept[name] = rows, activations(self.model, STAGES[name], rows, dtype, extras)
        read_at, kept = self._kept[name]
        return kept.scaled(rows.bytes / read_at.bytes)


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
    if kept.logits and config.marginal_head:
        of_bytes += 3 * 4 * rows.bytes * JOINT + 4 * min(CHUNKS, rows.chunks) * config.core_config().vocab_size
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


def _buffers(module: nn.Module) -> int:
    """Bytes of what is saved with a module and no parameter: each device holds all of it."""
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def _count(module: nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


# ------------------------------------------------------------------------------------------------------ the teacher


def teacher_config(recipe: TeacherRecipe) -> PreTrainedConfig:
    """The teacher's configuration: its folder's own, else the recipe's ``[teacher.config]``, else the small one's.

    Raises:
        UserError: none of them is there, the folder's cannot be read, or it says otherwise than the recipe.
    """
    if recipe.path is None:
        return small_config(recipe.architecture, recipe.vocab_size, **recipe.sizes)
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
