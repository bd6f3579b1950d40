"""From bytes to states: what the core reads, and what a router of its own reads."""

from typing import cast

from torch import Tensor, nn

import bytekernels
from bytekernels import BOS, Routing, SuffixState
from models.config import ByteLMConfig
from models.decoding import BlockState
from models.layers import ByteEmbedding, SwiGLU
from models.local_stack import LocalStack
from models.suffix import ChunkSuffixState, SuffixFeatures


class ByteReader(nn.Module):
    """Bytes to states of the byte-level width: embedding and blocks, of a kind that :class:`LocalStack` has."""

    def __init__(self, config: ByteLMConfig, num_layers: int, kind: str = "mamba2") -> None:
        super().__init__()
        self.embed = ByteEmbedding(config.width)
        self.stack = LocalStack(config, num_layers, kind)

    def forward(self, ids: Tensor, cu_seqlens: Tensor, states: list[BlockState] | None = None) -> Tensor:
        """[T] to [T, d]; the blocks' states after each sequence are added to ``states``."""
        return self.stack(self.embed.weight, cu_seqlens, ids, states)

    def step(self, ids: Tensor, states: list[BlockState], active: Tensor | None = None) -> Tensor:
        """One more byte of each of S sequences, uint8 [S] to [S, d]; active ones' states are updated in place."""
        return self.stack.step(self.embed(ids), states, active)

    def empty_state(self, sequences: int) -> list[BlockState]:
        """What is kept of S sequences that have not begun."""
        return self.stack.empty_state(sequences)


class Encoder(ByteReader):
    """Bytes to states of the core's width: embedding, blocks, SwiGLU; and suffix features where the model has them."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__(config, config.encoder_layers, config.encoder)
        self.bridge = SwiGLU(config.width, config.bridge_inner, config.core_width)
        self.suffix = SuffixFeatures(config) if config.suffix_bytes else None
        if self.suffix is not None:
            nn.init.zeros_(self.bridge.down.weight)  # the features alone, which are to be corrected

    def forward(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        states: list[BlockState] | None = None,
        ends_of: Routing | None = None,
    ) -> Tensor:
        """[T] to [T, d_core]; the blocks' states after each sequence are added to ``states``.

        With ``ends_of`` the states of its M chunks' ends alone, [M, d_core]: the SwiGLU runs over no other rows.
        """
        x = super().forward(ids, cu_seqlens, states)
        h = self.bridge(x if ends_of is None else bytekernels.gather_chunks(x, ends_of))
        if self.suffix is None or self.suffix.of_whole_chunks:
            return h
        return h + self.suffix(ids, cu_seqlens, None if ends_of is None else ends_of.index, states)

    def chunks(self, ids: Tensor, cu_seqlens: Tensor, routing: Routing, h: Tensor | None = None) -> Tensor:
        """What the core reads of M chunks, [M, d_core]: the states of their last bytes, and the chunks' features.

        With ``h``, what :meth:`forward` has given for all bytes, nothing is computed again.
        """
        ends = self(ids, cu_seqlens, ends_of=routing) if h is None else bytekernels.gather_chunks(h, routing)
        if self.suffix is None or not self.suffix.of_whole_chunks:
            return ends
        return ends + self.suffix.of_chunks(ids, cu_seqlens, routing)

    def open_chunks(self, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, states: list[BlockState]) -> None:
        """Add to ``states`` what is kept of the chunks that last bytes belong to: see :class:`SuffixFeatures`."""
        if self.suffix is not None and self.suffix.of_whole_chunks:
            states.append(self.suffix.open_chunks(ids, cu_seqlens, boundary | (ids == BOS)))

    def close(self, h: Tensor, closed: Tensor, states: list[BlockState]) -> Tensor:
        """As :meth:`chunks`, of the open chunks of S sequences whose last bytes' states are h: [S, d_core].

        Those of ``closed`` (bool [S]) end. The rows of the others mean nothing.
        """
        if self.suffix is None or not self.suffix.of_whole_chunks:
            return h
        return h + self.suffix.close(cast(ChunkSuffixState, states[-1]), closed)

    def step(self, ids: Tensor, states: list[BlockState], active: Tensor | None = None) -> Tensor:
        """As :meth:`ByteReader.step`, to [S, d_core]."""
        h = self.bridge(super().step(ids, states[: len(self.stack.blocks)], active))
        if self.suffix is None:
            return h
        if not self.suffix.of_whole_chunks:
            return h + self.suffix.step(ids, cast(SuffixState, states[-1]), active)
        self.suffix.take(ids, cast(ChunkSuffixState, states[-1]), active)
        return h

    def empty_state(self, sequences: int) -> list[BlockState]:
        """A state for each block, and one for suffix features."""
        states = super().empty_state(sequences)
        return states if self.suffix is None else [*states, self.suffix.empty_state(sequences)]
