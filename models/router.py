"""Where chunks end (distilled models) or start (H-Net): a boundary is where neighbouring states differ in direction."""

from torch import Tensor, nn

import bytekernels
from bytekernels import BOS, Routing
from models.config import ByteLMConfig
from models.layers import SwiGLU


class Router(nn.Module):
    """``prob = (1 - cos(q, k)) / 2`` between a byte and its neighbour (Hwang et al. 2025, arXiv 2507.07955).

    q and k are each a SwiGLU of the encoder's output. BOS is a chunk of its own, whatever the router thinks of it.
    """

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        width = config.core_width
        self.lookahead = config.lookahead
        self.q_proj = SwiGLU(width, config.router_inner, width)
        self.k_proj = SwiGLU(width, config.router_inner, width)

    def forward(self, h: Tensor, ids: Tensor, cu_seqlens: Tensor) -> Routing:
        """Route packed bytes.

        Args:
            h: [T, d_core], the encoder's output.
            ids: uint8 [T], the bytes.
            cu_seqlens: int32 [S+1].
        """
        return bytekernels.route(
            self.q_proj(h), self.k_proj(h), cu_seqlens, lookahead=self.lookahead, required=ids == BOS
        )
