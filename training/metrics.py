"""A stage's numbers, from the loop to files and to the eye. It takes floats and never waits for a device."""

import sys
from pathlib import Path
from typing import Any, Self

from training.errors import UserError
from training.progress_line import ProgressLine
from training.recipe import LogRecipe
from training.sinks import Jsonl, Sink, TensorBoard, WandB, check_wandb


class Metrics:
    """What the loop tells its numbers to, on every rank; only rank 0 writes and shows.

    The loop makes the floats of one step from a single tensor that it copies to the host every ``log.every`` steps, so
    nothing here, and no step in between, waits for the device. A log that cannot be written any more (a full disk) is
    dropped with a warning, and training goes on.

    Args:
        folder: of the stage's logs; made on rank 0.
        title: of the progress line.
        recipe: which logs are wanted.
        is_main: whether this is rank 0.
        step: resumed from; what earlier attempts logged of later steps is dropped.
        name: of a Weights & Biases run; ``title`` if None.
        config: shown beside it.

    Raises:
        UserError: the folder cannot be written, or Weights & Biases is asked for and is not there.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        recipe: LogRecipe,
        *,
        is_main: bool,
        step: int = 0,
        name: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        check_wandb(recipe.wandb)
        self.sinks: list[Sink] = []
        self.line: ProgressLine | None = None
        if is_main:
            self._open(folder, recipe, step, name or title.strip(), config or {})
            self.line = ProgressLine(title)

    def _open(self, folder: Path, recipe: LogRecipe, step: int, name: str, config: dict[str, Any]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if recipe.jsonl:
                self.sinks.append(Jsonl(folder, step))
            if recipe.tensorboard:
                self.sinks.append(TensorBoard(folder, step))
            if recipe.wandb is not None:
                self.sinks.append(WandB(folder, recipe.wandb, name, config))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot write logs to {folder} ({reason}): free space there or give another --out"
            ) from None

    def log(self, step: int, values: dict[str, float], bytes_total: int, seconds: float) -> None:
        """Write the numbers of a step, and show them from now on.

        Args:
            step: optimizer steps so far.
            values: by name; finite or not.
            bytes_total: bytes trained on so far, over all ranks.
            seconds: of training so far.
        """
        for sink in list(self.sinks):
            try:
                sink.write(step, values, bytes_total, seconds)
            except OSError as error:
                self.sinks.remove(sink)
                _warn(sink, error)
        if self.line is not None:
            self.line.show(values)

    def progress(self, fraction: float) -> None:
        """Say which share of the stage is done, in [0, 1]."""
        if self.line is not None:
            self.line.move(fraction)

    def close(self) -> None:
        """Close all logs, once."""
        if self.line is not None:
            self.line.close()
        while self.sinks:
            sink = self.sinks.pop()
            try:
                sink.close()
            except OSError as error:
                _warn(sink, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _warn(sink: Sink, error: OSError) -> None:
    print(
        f"training goes on without its {type(sink).__name__} log, which cannot be written "
        f"({error.strerror or error}): free space and resume to have it again",
        file=sys.stderr,
        flush=True,
    )
