"""What the loop says of its steps, as numbers for people and files."""

from collections.abc import Callable
from typing import Self

from training.loop import Progress, Step
from training.meter import Meter
from training.metrics import Metrics

OTHERS = ("loss", "lr", "grad_norm", "skipped")  # what is said beside the loss's parts and the meter's readings


class StageLog:
    """A stage's log as the loop wants one: steps in, the interval's rates added, numbers out.

    Args:
        metrics: where the numbers go; the first process's alone go anywhere.
        meter: of this process, at where the stage goes on from.
        every: optimizer steps between lines; a skipped step is always told.
        flops: of the model in training on so many bytes.
    """

    def __init__(self, metrics: Metrics, meter: Meter, every: int, flops: Callable[[int], float]) -> None:
        self.metrics, self.meter, self.every, self.flops = metrics, meter, every, flops

    def log(self, step: Step, progress: Progress, rate: float) -> None:
        """Write a step down: the loss and its parts, lr, gradient norm, skipped steps, and the meter's readings."""
        readings = self.meter.read(progress.bytes, progress.seconds, progress.waited, self.flops(progress.bytes))
        values = {
            **step.means,
            "loss": sum(step.means.values()),
            "lr": rate,
            "grad_norm": step.grad_norm,
            "skipped": float(progress.skipped),
        }
        self.metrics.log(progress.step, {**values, **readings}, progress.bytes, progress.seconds)

    def progress(self, fraction: float) -> None:
        """How far the stage is, in [0, 1]."""
        self.metrics.progress(fraction)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.metrics.close()
