"""The training loop: batches in, steps out. It knows nothing about stages."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bytekernels import AlignedBatch
from training.errors import Preempted, UserError
from training.objectives import Loss
from training.optimizer import Optimizer, make_optimizer
from training.parallel import Ranks
from training.prefetch import Prefetcher, Source
from training.recipe import OptimizerRecipe, StageRecipe
from training.snapshot import Saved, Snapshots

RNG = "rng/"  # names of the random generators' states


@dataclass
class Progress:
    """How far a stage has come.

    Attributes:
        step: optimizer steps, skipped ones among them.
        bytes: read, over all ranks.
        seconds: of training.
        waited: seconds of them spent waiting for data.
        skipped: steps that moved nothing because loss or gradient was not finite.
        skipped_in_a_row: those of them since the last step that did.
    """

    step: int = 0
    bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def data_wait(self) -> float:
        """The share of training time spent waiting for data, in [0, 1]."""
        return min(1.0, self.waited / max(self.seconds, 1e-9))


class Step(NamedTuple):
    """What an optimizer step came to, on the host and alike on every rank.

    Attributes:
        means: the loss's parts, each a mean over the items of all micro-batches and ranks.
        grad_norm: of the mean gradient, before clipping.
        num_bytes: read, over all ranks.
        seconds: rank 0's clock at the step's beginning, seconds of training.
        stop: a rank has been told to stop.
        finite: loss and gradient are; the step has then moved the weights.
    """

    means: dict[str, float]
    grad_norm: float
    num_bytes: int
    seconds: float
    stop: bool
    finite: bool


class Log(Protocol):
    """Where a step's numbers go."""

    every: int

    def log(self, step: Step, progress: Progress, rate: float) -> None: ...

    def progress(self, fraction: float) -> None: ...


def learning_rate(recipe: StageRecipe, fraction: float) -> float:
    """The rate at a fraction in [0, 1] of a stage: a linear rise over ``warmup``, then a fall to ``floor`` x peak."""
    if fraction < recipe.warmup:
        return recipe.lr * fraction / recipe.warmup
    down = (fraction - recipe.warmup) / max(1 - recipe.warmup, 1e-12)
    shape = 1 - down if recipe.decay == "linear" else 0.5 * (1 + math.cos(math.pi * min(down, 1.0)))
    return recipe.lr * (recipe.floor + (1 - recipe.floor) * max(shape, 0.0))


def train(
    model: nn.Module,
    named: list[tuple[str, nn.Parameter]],
    objective: Callable[[AlignedBatch], Loss],
    batches: Source,
    *,
    stage: StageRecipe,
    optimizer: OptimizerRecipe,
    accumulation: int,
    ranks: Ranks,
    precision: AbstractContextManager,
    snapshots: Snapshots,
    checkpoint_seconds: float,
    log: Callable[[Progress], AbstractContextManager[Log]],
    origin: str = "",
    told: Sequence[int] = (),
) -> Progress:
    """Train until the stage's bytes or seconds are used up, from its last snapshot if there is one.

    Args:
        model: what learns, put into training mode.
        named: the parameters that learn. They alone are kept in snapshots, with the optimizer's state.
        objective: of a batch on ``ranks.device``.
        batches: endless. They are prefetched, and stand somewhere ahead afterwards.
        stage: length, learning rates.
        optimizer: the optimizer's numbers.
        accumulation: batches in one optimizer step, on each rank.
        ranks: this process among its peers.
        precision: context that every forward pass runs in (autocast, or nothing).
        snapshots: written every ``checkpoint_seconds`` and read at the start.
        checkpoint_seconds: training time between snapshots.
        log: makes a log that continues from where the stage is.
        origin: where all other parameters come from; a snapshot of a stage with another origin is refused.
        told: is not empty once this process has been told to stop (:func:`told_to_stop`).

    Raises:
        UserError: a snapshot is damaged, of other data, or can't be written; loss or gradient is not finite in more
            than ``optimizer.max_skipped`` steps in a row.
        Preempted: a process was told to stop; a snapshot has been written.
    """
    mover = make_optimizer(named, optimizer, stage)
    ahead = Prefetcher(batches, ranks.device)
    progress = _restore(snapshots, named, mover, ahead, ranks, origin)
    seconds = saved_at = progress.seconds  # rank 0's clock, which all ranks go by

    def save() -> None:
        _save(snapshots, named, mover, ahead, progress, ranks, origin)

    model.train()
    with ahead, log(progress) as report:
        while (fraction := _fraction(stage, progress.bytes, seconds)) < 1:
            began = time.monotonic()
            rate = learning_rate(stage, fraction)
            sums = accumulate(model, objective, ahead, accumulation, precision)
            step = finish_step(
                sums, named, mover, rate, optimizer.clip, ranks, seconds=progress.seconds, stop=bool(told)
            )
            progress.step += 1
            progress.bytes += step.num_bytes
            progress.skipped += not step.finite
            progress.skipped_in_a_row = 0 if step.finite else progress.skipped_in_a_row + 1
            progress.seconds += time.monotonic() - began
            progress.waited += ahead.waiting()
            seconds = step.seconds
            if progress.skipped_in_a_row > optimizer.max_skipped:
                raise UserError(
                    f"loss or gradient is not finite in {progress.skipped_in_a_row} steps in a row, the last of them "
                    f"step {progress.step} ({step.means}, gradient norm {step.grad_norm}): lower the stage's lr or "
                    "raise its warmup"
                )
            if not step.finite or progress.step % report.every == 1 % report.every:
                report.log(step, progress, rate)
            report.progress(_fraction(stage, progress.bytes, seconds))
            snapshots.poll()
            if step.stop:
                save()
                snapshots.wait()
                raise Preempted(f"told to stop after step {progress.step}; a checkpoint is in {snapshots.folder}")
            if seconds - saved_at >= checkpoint_seconds:
                saved_at = seconds
                save()
    snapshots.wait()
    model.eval()
    return progress


@contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM comes, which is then not deadly. Threads other than the first can't listen."""
    told: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    except ValueError:
        yield told
        return
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def _fraction(stage: StageRecipe, num_bytes: int, seconds: float) -> float:
    if stage.bytes is not None:
        return num_bytes / stage.bytes
    assert stage.seconds is not None  # a recipe has one or the other
    return seconds / stage.seconds


class Sums(NamedTuple):
    """Sums over the micro-batches of a step on one rank: items, loss parts, bytes."""

    count: Tensor
    parts: dict[str, Tensor]
    num_bytes: int


def accumulate(
    model: nn.Module,
    objective: Callable[[AlignedBatch], Loss],
    batches: Prefetcher,
    accumulation: int,
    precision: AbstractContextManager,
) -> Sums:
    """Gradients of a step's batches, added up. The host waits for nothing.

    Copies of a model (replicate x shard) share their gradients at the last batch alone.
    """
    count: Tensor | float = 0.0
    parts: dict[str, Tensor] = {}
    num_bytes = 0
    for number in range(1, accumulation + 1):
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(number == accumulation)
        batch = next(batches)
        num_bytes += batch.ids.shape[0]
        with precision:
            loss = objective(batch)
        loss.total.backward()
        count = count + loss.count
        for name, value in loss.parts.items():
            parts[name] = parts.get(name, 0.0) + value
    assert isinstance(count, Tensor)
    return Sums(count, parts, num_bytes)


def finish_step(
    sums: Sums,
    named: list[tuple[str, nn.Parameter]],
    mover: Optimizer,
    rate: float,
    clip: float,
    ranks: Ranks,
    *,
    seconds: float,
    stop: bool,
) -> Step:
    """Share the sums, then move the weights, on every rank alike, with one wait for the device."""
    gradients = [parameter.grad for _, parameter in named if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    shared = [sums.count, *sums.parts.values()]
    device = sums.count.device
    own = torch.tensor([sums.num_bytes, stop, seconds * ranks.is_main], dtype=torch.float64).to(device)
    norm = norm.double() if ranks.is_main else torch.zeros_like(norm, dtype=torch.float64)  # copies may round otherwise
    totals = ranks.sum_(torch.cat([torch.stack([value.double() for value in shared]), own, norm[None]]))
    count, *parts, num_bytes, stops, clock, raw_norm = totals.tolist()
    # FSDP has averaged the ranks' gradients of sums; what is wanted is the sum over ranks, by item.
    factor = ranks.size / count if count else math.nan
    grad_norm = raw_norm * factor
    means = {name: value / count if count else math.nan for name, value in zip(sums.parts, parts, strict=True)}
    finite = all(math.isfinite(value) for value in (*means.values(), grad_norm))
    if finite:
        torch._foreach_mul_(gradients, factor * min(1.0, clip / (grad_norm + 1e-6)))
        mover.step(rate)
    else:
        mover.skip()
    return Step(means, grad_norm, round(num_bytes), clock, stops > 0, finite)


def _save(
    snapshots: Snapshots,
    named: list[tuple[str, nn.Parameter]],
    mover: Optimizer,
    batches: Prefetcher,
    progress: Progress,
    ranks: Ranks,
    origin: str,
) -> None:
    tensors = {f"model/{name}": parameter.detach() for name, parameter in named}
    tensors |= {f"optimizer/{name}": value for name, value in mover.tensors().items()}
    about: dict[str, Any] = {
        "progress": asdict(progress),
        "batches": batches.merge_states(ranks.gather(batches.state_dict())),
        "processes": ranks.size,
        "origin": origin,
    }
    snapshots.save(progress.step, tensors | _random_states(ranks), about)


def _restore(
    snapshots: Snapshots,
    named: list[tuple[str, nn.Parameter]],
    mover: Optimizer,
    batches: Prefetcher,
    ranks: Ranks,
    origin: str,
) -> Progress:
    def blank(saved: dict[str, Saved]) -> dict[str, Tensor]:
        tensors = {f"model/{name}": parameter.detach() for name, parameter in named}
        remembered = {name[10:]: one for name, one in saved.items() if name.startswith("optimizer/")}
        tensors |= {f"optimizer/{name}": value for name, value in mover.blank(remembered).items()}
        # Random generators go on where they were where there are as many processes; else they start anew.
        return tensors | {name: value for name, value in _random_states(ranks).items() if name in saved}

    loaded = snapshots.load(blank)
    if loaded is None:
        return Progress()
    tensors, about = loaded
    if about["origin"] != origin:
        raise UserError(
            f"checkpoint {snapshots.newest()} goes on from {about['origin']}, not from {origin}: give the same --from, "
            "or --overwrite"
        )
    mover.restore({name[10:]: value for name, value in tensors.items() if name.startswith("optimizer/")})
    try:
        batches.load_state_dict(about["batches"])
    except ValueError as error:
        raise UserError(f"checkpoint {snapshots.newest()} does not fit this run: {error}") from None
    if about["processes"] == ranks.size:
        _set_random_states(tensors, ranks)
    return Progress(**about["progress"])


def _random_states(ranks: Ranks) -> dict[str, Tensor]:
    states = {f"{RNG}cpu/{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states[f"{RNG}cuda/{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return states


def _set_random_states(tensors: dict[str, Tensor], ranks: Ranks) -> None:
    if (state := tensors.get(f"{RNG}cpu/{ranks.rank}")) is not None:
        torch.set_rng_state(state)
    if (state := tensors.get(f"{RNG}cuda/{ranks.rank}")) is not None:
        torch.cuda.set_rng_state(state, ranks.device)
