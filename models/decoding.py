"""What a byte-level model remembers of its sequences between two bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from torch import Tensor

from bytekernels import MixerState, SuffixState
from models.chunk_cache import ChunkCache
from models.marginal_head import MarginalState
from models.window_attention import WindowState

BlockState = MixerState | WindowState | SuffixState | MarginalState  # all of whose fields are tensors [S, ...]


@dataclass
class DecodingState:
    """S slots, one sequence each; every sequence may hold another number of chunks.

    Attributes:
        encoder: a state for each of the encoder's blocks, and one for suffix features where the model has them.
        router: a state for each block of the router's own encoder; none where it reads the encoder's states.
        decoder: a state for each of the decoder's blocks, and one for the marginal head where the model has it.
        cache: the core's keys and values.
        held: [S, d_core], what a byte reads of the chunks: the newest finished one, or their moving average.
    """

    encoder: list[BlockState]
    router: list[BlockState]
    decoder: list[BlockState]
    cache: ChunkCache
    held: Tensor

    def select(self, slots: Tensor) -> Self:
        """A copy of some slots, int64 [R], in that order; they may repeat."""
        return type(self)(
            [_select(state, slots) for state in self.encoder],
            [_select(state, slots) for state in self.router],
            [_select(state, slots) for state in self.decoder],
            self.cache.select(slots),
            self.held[slots],
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that :meth:`restore` needs, by name; shares memory with the state."""
        tensors = {"held": self.held, "cache.lengths": self.cache.lengths}
        for part in ("encoder", "router", "decoder"):
            for i, state in enumerate(getattr(self, part)):
                tensors |= {f"{part}.{i}.{name}": tensor for name, tensor in tensors_of(state).items()}
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


def tensors_of(state: BlockState) -> dict[str, Tensor]:
    """A block's state by the names of its fields."""
    return {field.name: getattr(state, field.name) for field in fields(state)}


def copy_of(state: BlockState) -> BlockState:
    """The same state in memory of its own."""
    return type(state)(**{name: tensor.clone() for name, tensor in tensors_of(state).items()})


def _select(state: BlockState, slots: Tensor) -> BlockState:
    return type(state)(**{name: tensor[slots] for name, tensor in tensors_of(state).items()})
