"""A source of batches that changes those of another as they come."""

from collections.abc import Sequence
from typing import Any, Protocol

from bytekernels import AlignedBatch
from training.noise import NoisedBatch


class Change(Protocol):
    """What is done to a batch on the CPU. It is a function of the batch, so there is nothing to resume."""

    def apply(self, batch: AlignedBatch) -> AlignedBatch | NoisedBatch: ...


class ChangedBatches:
    """Batches of another source, changed. Its state is the other's."""

    def __init__(self, batches: Any, change: Change) -> None:
        self.batches, self.change = batches, change

    def __iter__(self) -> "ChangedBatches":
        return self

    def __next__(self) -> AlignedBatch | NoisedBatch:
        return self.build_next()

    def build_next(self, *, pin: bool = False, threads: int | None = None) -> AlignedBatch | NoisedBatch:
        """The next batch, in page-locked memory where ``pin``; the one before the change is built by ``threads``."""
        changed = self.change.apply(self.batches.build_next(pin=False, threads=threads))
        return changed if not pin else type(changed)(*(None if t is None else t.pin_memory() for t in changed))

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.batches.merge_states(states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)

    def close(self) -> None:
        self.batches.close()
