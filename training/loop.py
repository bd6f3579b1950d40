"""The training loop: batches in, steps out. It knows nothing about stages."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bytekernels import AlignedBatch
from training.checkpoint import load_state, save_state
from training.errors import UserError
from training.objectives import Loss
from training.optimizer import Optimizer, make_optimizer
from training.parallel import Ranks
from training.prefetch import Prefetcher, Source
from training.recipe import OptimizerRecipe, StageRecipe

LOG_EVERY = 10  # optimizer steps between lines of the log


class Log(Protocol):
    """Where numbers go: TensorBoard's writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


@dataclass
class Progress:
    """How far a stage has come: optimizer steps, bytes over all ranks, seconds of training, those waited for data."""

    step: int = 0
    bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def data_wait(self) -> float:
        """The share of training time spent waiting for data, in [0, 1]."""
        return min(1.0, self.waited / max(self.seconds, 1e-9))


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
    checkpoint: Path,
    checkpoint_seconds: float,
    log: Callable[[int], Log] | None = None,
    title: str = "",
) -> Progress:
    """Train until the stage's bytes or seconds are used up, from its last checkpoint if there is one.

    Args:
        model: checkpointed whole.
        named: the parameters that learn.
        objective: of a batch on ``ranks.device``.
        batches: endless; the same state on every rank. They are prefetched, and stand somewhere ahead afterwards.
        stage: length, learning rates.
        optimizer: AdamW's numbers.
        accumulation: batches in one optimizer step, on each rank.
        ranks: this process among its peers.
        precision: context that every forward pass runs in (autocast, or nothing).
        checkpoint: folder that is written every ``checkpoint_seconds`` and read at the start.
        checkpoint_seconds: training time between checkpoints.
        log: makes a log that continues at a step; only rank 0 has one.
        title: of the progress bar.

    Raises:
        UserError: the checkpoint is damaged or of other data; the loss is no longer finite.
    """
    parameters = [parameter for _, parameter in named]
    mover = make_optimizer(named, optimizer, stage)
    ahead = Prefetcher(batches, ranks.device)
    progress = _restore(checkpoint, model, mover, ahead)
    writer = log(progress.step) if log else None
    bar = tqdm(total=100, desc=title, disable=not ranks.is_main, unit="%", bar_format="{desc} {bar} {n:3.0f}%{postfix}")
    seconds = saved_at = progress.seconds  # rank 0's clock, which all ranks go by
    model.train()
    with ahead:
        while (fraction := _fraction(stage, progress.bytes, seconds)) < 1:
            began = time.monotonic()
            rate = learning_rate(stage, fraction)
            count, parts, num_bytes = _accumulate(objective, ahead, accumulation, ranks, precision)
            ranks.sum_gradients(parameters, count)
            norm = nn.utils.clip_grad_norm_(parameters, optimizer.clip, foreach=True)
            mover.step(rate)
            progress.step += 1
            progress.bytes += num_bytes
            progress.seconds += time.monotonic() - began
            progress.waited += ahead.waiting()
            seconds = ranks.from_main(progress.seconds)
            save = seconds - saved_at >= checkpoint_seconds
            if save or progress.step % LOG_EVERY == 1:
                means = _finite_means(parts, count, norm, progress, ranks)
                _report({**means, "lr": rate, "grad_norm": float(norm)}, progress, writer, bar)
            bar.update(100 * min(1.0, _fraction(stage, progress.bytes, seconds)) - bar.n)
            if save:
                saved_at = seconds
                _save(checkpoint, model, mover, ahead, progress, ranks)
    bar.close()
    if writer is not None:
        writer.close()
    model.eval()
    return progress


def _fraction(stage: StageRecipe, num_bytes: int, seconds: float) -> float:
    if stage.bytes is not None:
        return num_bytes / stage.bytes
    assert stage.seconds is not None  # a recipe has one or the other
    return seconds / stage.seconds


def _accumulate(
    objective: Callable[[AlignedBatch], Loss],
    batches: Prefetcher,
    accumulation: int,
    ranks: Ranks,
    precision: AbstractContextManager,
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Gradients of an optimizer step's batches, summed up.

    Returns:
        The items over all ranks, this rank's loss parts, and the bytes over all ranks.
    """
    count = torch.zeros((), dtype=torch.float64, device=ranks.device)
    parts: dict[str, Tensor] = {}
    num_bytes = 0
    for _ in range(accumulation):
        batch = next(batches)
        num_bytes += batches.round_bytes
        with precision:
            loss = objective(batch)
        loss.total.backward()
        count += loss.count
        for name, value in loss.parts.items():
            parts[name] = parts.get(name, 0.0) + value
    return ranks.sum_(count), parts, num_bytes


def _finite_means(
    parts: dict[str, Tensor], count: Tensor, norm: Tensor, progress: Progress, ranks: Ranks
) -> dict[str, float]:
    sums = ranks.sum_(torch.stack([value.double() for value in parts.values()]))
    means = dict(zip(parts, (sums / count).tolist(), strict=True))
    if not all(math.isfinite(value) for value in (*means.values(), float(norm))):
        raise UserError(
            f"loss or gradient is no longer finite at step {progress.step} ({means}, gradient norm {float(norm)}): "
            "lower the stage's lr or raise its warmup"
        )
    return means


def _report(values: dict[str, float], progress: Progress, writer: Log | None, bar: tqdm) -> None:
    values["bytes_per_second"] = progress.bytes / max(progress.seconds, 1e-9)
    values["data_wait"] = progress.data_wait
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, progress.step)
    bar.set_postfix_str(" " + " ".join(f"{name} {value:.4g}" for name, value in values.items()), refresh=False)


def _save(
    checkpoint: Path, model: nn.Module, mover: Optimizer, batches: Prefetcher, progress: Progress, ranks: Ranks
) -> None:
    if ranks.is_main:
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "optimizer": mover.state_dict(),
            "batches": batches.state_dict(),
            "progress": asdict(progress),
            "rng": torch.get_rng_state(),
        }
        save_state(checkpoint, state, asdict(progress))
    ranks.barrier()


def _restore(checkpoint: Path, model: nn.Module, mover: Optimizer, batches: Prefetcher) -> Progress:
    state = load_state(checkpoint)
    if state is None:
        return Progress()
    try:
        model.load_state_dict(state["model"])
        mover.load_state_dict(state["optimizer"])
        batches.load_state_dict(state["batches"])
    except (ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint {checkpoint} does not fit this run: {str(error).splitlines()[0]}") from None
    torch.set_rng_state(state["rng"])
    return Progress(**state["progress"])
