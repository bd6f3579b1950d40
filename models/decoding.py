"""What a byte-level model remembers of its sequences between two bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from bytekernels import MixerState
from models.chunk_cache import ChunkCache


@dataclass
class DecodingState:
    """S slots, one sequence each; every sequence may hold another number of chunks.

    Attributes:
        encoder: a state for each of the encoder's blocks.
        decoder: a state for each of the decoder's blocks.
        cache: the core's keys and values.
        held: [S, d_core], what a byte reads of the chunks: the newest finished one, or their moving average.
    """

    encoder: list[MixerState]
    decoder: list[MixerState]
    cache: ChunkCache
    held: Tensor

    def select(self, slots: Tensor) -> Self:
        """A copy of some slots, int64 [R], in that order; they may repeat."""
        return type(self)(
            [_select(state, slots) for state in self.encoder],
            [_select(state, slots) for state in self.decoder],
            self.cache.select(slots),
            self.held[slots],
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that :meth:`restore` needs, by name; shares memory with the state."""
        tensors = {"held": self.held, "cache.lengths": self.cache.lengths}
        for part in ("encoder", "decoder"):
            for i, state in enumerate(getattr(self, part)):
                tensors |= {f"{part}.{i}.{name}": getattr(state, name) for name in ("conv", "position", "ssm")}
        for name in ("keys", "values"):
            for i, kept in enumerate(getattr(self.cache, name)):
                if kept is not None:
                    tensors[f"cache.{i}.{name}"] = kept[:, : self.cache.longest]
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave, into a state of the same model and as many slots.

        Raises:
            ValueError: a tensor is missing, or was made by another model.
        """
        mine = {name: tensor for name, tensor in self.tensors().items() if not name.startswith("cache.")}
        for name, tensor in mine.items():
            if name not in tensors:
                raise ValueError(f"the saved state has no tensor {name}: it is of another model or kind of file")
            if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                raise ValueError(
                    f"{name} must be {tensor.dtype} {list(tensor.shape)}, got {tensors[name].dtype} "
                    f"{list(tensors[name].shape)}: the state was saved by another model, or in another dtype"
                )
            tensor.copy_(tensors[name])
        self.cache.restore(tensors)


def _select(state: MixerState, slots: Tensor) -> MixerState:
    return MixerState(state.conv[slots], state.position[slots], state.ssm[slots])
