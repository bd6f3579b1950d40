"""From bytes to states: what the core reads, and what a router of its own reads."""

from torch import Tensor, nn

import bytekernels
from bytekernels import Routing
from models.config import ByteLMConfig
from models.decoding import BlockState
from models.layers import ByteEmbedding, SwiGLU
from models.local_stack import LocalStack


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


class Encoder(ByteReader):
    """Bytes to states of the core's width: embedding, blocks, SwiGLU."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__(config, config.encoder_layers, config.encoder)
        self.bridge = SwiGLU(config.width, config.bridge_inner, config.core_width)

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
        return self.bridge(x if ends_of is None else bytekernels.gather_chunks(x, ends_of))

    def step(self, ids: Tensor, states: list[BlockState], active: Tensor | None = None) -> Tensor:
        """As :meth:`ByteReader.step`, to [S, d_core]."""
        return self.bridge(super().step(ids, states, active))
