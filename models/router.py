"""Where chunks end (distilled models) or start (H-Net): a boundary is where neighbouring states differ in direction."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    def pair(self, h: Tensor, following: Tensor) -> Tensor:
        """Probability that a chunk ends on a byte, from its state and that of the byte after it, which may be a draft.

        ``(1 - cos(q(h), k(following))) / 2``, as :meth:`forward` has it inside a sequence where the router looks ahead;
        a chunk ends where it is at least 0.5. The rows are independent, and the host does not wait for the device.

        Args:
            h: [S, d_core], the encoder's output at S bytes.
            following: [S, d_core], at the bytes after them.

        Returns:
            float32 [S] (float64 where the states are).

        Raises:
            ValueError: h and following differ in shape.
        """
        if h.shape != following.shape:
            raise ValueError(f"following must have h's shape {list(h.shape)}, got {list(following.shape)}")
        # One sequence of S+1 rows, with k a row late: row s of q meets row s+1 of k, which is the s-th of following.
        q, k = F.pad(self.q_proj(h), (0, 0, 0, 1)), F.pad(self.k_proj(following), (0, 0, 1, 0))
        rows = q.shape[0]
        cu_seqlens = torch.arange(0, rows + 1, rows, dtype=torch.int32, device=q.device)
        return bytekernels.route(q, k, cu_seqlens, capacity=0).prob[:-1]
