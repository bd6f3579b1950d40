"""The training loop: batches in, steps out. It knows nothing about stages."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.checkpoint import load_state, save_state
from training.data import Batch, Batches
from training.errors import UserError
from training.objectives import Loss
from training.parallel import Ranks
from training.recipe import OptimizerRecipe, StageRecipe

LOG_EVERY = 10  # optimizer steps between lines of the log


class Log(Protocol):
    """Where numbers go: TensorBoard's writer, or nothing."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


@dataclass
class Progress:
    """How far a stage has come: optimizer steps, bytes over all ranks, seconds of training."""

    step: int = 0
    bytes: int = 0
    seconds: float = 0.0


def learning_rate(recipe: StageRecipe, fraction: float) -> float:
    """The rate at a fraction in [0, 1] of a stage: a linear rise over ``warmup``, then a fall to ``floor`` x peak."""
    if fraction < recipe.warmup:
        return recipe.lr * fraction / recipe.warmup
    down = (fraction - recipe.warmup) / max(1 - recipe.warmup, 1e-12)
    shape = 1 - down if recipe.decay == "linear" else 0.5 * (1 + math.cos(math.pi * min(down, 1.0)))
    return recipe.lr * (recipe.floor + (1 - recipe.floor) * max(shape, 0.0))


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], recipe: OptimizerRecipe, stage: StageRecipe
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only (not norms, biases, A_log, D, dt_bias, convolutions, embeddings).

    Each group carries its ``scale``, the factor on the stage's learning rate.

    Raises:
        UserError: a prefix in ``lr_scale`` that no trained parameter begins with.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    unused = set(stage.lr_scale)
    for name, parameter in named:
        prefixes = [prefix for prefix in stage.lr_scale if name.startswith(prefix)]
        unused -= set(prefixes)
        scale = stage.lr_scale[max(prefixes, key=len)] if prefixes else 1.0
        decays = parameter.ndim == 2 and "embed" not in name
        groups.setdefault((scale, decays), []).append(parameter)
    if unused:
        raise UserError(f"lr_scale: no trained parameter begins with {sorted(unused)[0]!r}")
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": recipe.weight_decay if decays else 0.0, "scale": scale}
            for (scale, decays), parameters in groups.items()
        ],
        lr=stage.lr,
        betas=(recipe.beta1, recipe.beta2),
        fused=True,
    )


def train(
    model: nn.Module,
    named: list[tuple[str, nn.Parameter]],
    objective: Callable[[Batch], Loss],
    batches: Batches,
    *,
    stage: StageRecipe,
    optimizer: OptimizerRecipe,
    accumulation: int,
    ranks: Ranks,
    precision: AbstractContextManager,
    checkpoint: Path,
    checkpoint_seconds: float,
    log: Log | None = None,
    title: str = "",
) -> Progress:
    """Train until the stage's bytes or seconds are used up, from its last checkpoint if there is one.

    Args:
        model: checkpointed whole.
        named: the parameters that learn.
        objective: of a batch on ``ranks.device``.
        batches: endless; the same state on every rank.
        stage: length, learning rates.
        optimizer: AdamW's numbers.
        accumulation: batches in one optimizer step, on each rank.
        ranks: this process among its peers.
        precision: context that every forward pass runs in (autocast, or nothing).
        checkpoint: folder that is written every ``checkpoint_seconds`` and read at the start.
        checkpoint_seconds: training time between checkpoints.
        log: written every ten steps; only rank 0 has one.
        title: of the progress bar.

    Raises:
        UserError: the checkpoint is damaged or of other data; the loss is no longer finite.
    """
    parameters = [parameter for _, parameter in named]
    adam = make_optimizer(named, optimizer, stage)
    progress = _restore(checkpoint, model, adam, batches)
    saved_at = progress.seconds
    bar = tqdm(total=100, desc=title, disable=not ranks.is_main, unit="%", bar_format="{desc} {bar} {n:3.0f}%{postfix}")
    model.train()
    while (fraction := ranks.from_main(_fraction(stage, progress))) < 1:
        began = time.monotonic()
        rate = learning_rate(stage, fraction)
        for group in adam.param_groups:
            group["lr"] = rate * group["scale"]
        count, parts, num_bytes = _accumulate(objective, batches, accumulation, ranks, precision)
        ranks.sum_gradients(parameters, count)
        norm = nn.utils.clip_grad_norm_(parameters, optimizer.clip, foreach=True)
        adam.step()
        adam.zero_grad(set_to_none=True)
        progress.step += 1
        progress.bytes += num_bytes
        progress.seconds += time.monotonic() - began
        if progress.step % LOG_EVERY == 1:
            _report(parts, count, norm, rate, progress, ranks, log, bar)
        bar.update(100 * min(1.0, _fraction(stage, progress)) - bar.n)
        if ranks.from_main(progress.seconds) - saved_at >= checkpoint_seconds:
            saved_at = progress.seconds
            _save(checkpoint, model, adam, batches, progress, ranks)
    bar.close()
    model.eval()
    return progress


def _fraction(stage: StageRecipe, progress: Progress) -> float:
    if stage.bytes is not None:
        return progress.bytes / stage.bytes
    assert stage.seconds is not None  # a recipe has one or the other
    return progress.seconds / stage.seconds


def _accumulate(
    objective: Callable[[Batch], Loss], batches: Batches, accumulation: int, ranks: Ranks, precision: AbstractContextManager
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Gradients summed over an optimizer step's batches: items (over ranks), loss parts (this rank), bytes (over ranks)."""
    count = torch.zeros((), dtype=torch.float64, device=ranks.device)
    parts: dict[str, Tensor] = {}
    num_bytes = 0
    for _ in range(accumulation):
        batch = next(batches)
        num_bytes += batch.ids.shape[0]
        with precision:
            loss = objective(batch.to(ranks.device))
        loss.total.backward()
        count += loss.count
        for name, value in loss.parts.items():
            parts[name] = parts.get(name, 0.0) + value
    return ranks.sum_(count), parts, num_bytes * ranks.size


def _report(
    parts: dict[str, Tensor],
    count: Tensor,
    norm: Tensor,
    rate: float,
    progress: Progress,
    ranks: Ranks,
    log: Log | None,
    bar: tqdm,
) -> None:
    sums = ranks.sum_(torch.stack([value.double() for value in parts.values()]))
    means = dict(zip(parts, (sums / count).tolist(), strict=True))
    if not all(math.isfinite(value) for value in means.values()):
        raise UserError(
            f"the loss is no longer finite at step {progress.step} ({means}); lower the stage's lr or raise its warmup"
        )
    if log is None:
        return
    speed = progress.bytes / max(progress.seconds, 1e-9)
    for name, value in {**means, "lr": rate, "grad_norm": float(norm), "bytes_per_second": speed}.items():
        log.add_scalar(name, value, progress.step)
    shown = " ".join(f"{name} {value:.4g}" for name, value in means.items())
    bar.set_postfix_str(f" {shown} lr {rate:.1e} {speed / 1000:.1f} kB/s", refresh=False)


def _save(
    checkpoint: Path, model: nn.Module, adam: torch.optim.Optimizer, batches: Batches, progress: Progress, ranks: Ranks
) -> None:
    if ranks.is_main:
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "optimizer": adam.state_dict(),
            "batches": batches.state_dict(),
            "progress": asdict(progress),
            "rng": torch.get_rng_state(),
        }
        save_state(checkpoint, state, asdict(progress))
    ranks.barrier()


def _restore(checkpoint: Path, model: nn.Module, adam: torch.optim.Optimizer, batches: Batches) -> Progress:
    state = load_state(checkpoint)
    if state is None:
        return Progress()
    try:
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])
        batches.load_state_dict(state["batches"])
    except (ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint {checkpoint} does not fit this run: {error}") from None
    torch.set_rng_state(state["rng"])
    return Progress(**state["progress"])
