"""Where chunks end (distilled models) or start (H-Net): a boundary is where neighbouring states differ in direction."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bytekernels
from bytekernels import BOS, Routing
from models.config import ByteLMConfig
from models.decoding import BlockState
from models.encoder import ByteReader
from models.layers import SwiGLU


class Router(nn.Module):
    """``prob = (1 - cos(q, k)) / 2`` between a byte and its neighbour (Hwang et al. 2025, arXiv 2507.07955).

    q and k are each a SwiGLU of what the router reads: the encoder's output, or with ``router="split"`` that of a small
    encoder of its own. BOS is a chunk of its own, whatever the router thinks of it.
    """

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        split = config.router == "split"
        width = config.width if split else config.core_width
        self.lookahead = config.lookahead
        self.encoder = ByteReader(config, config.router_layers) if split else None
        self.q_proj = SwiGLU(width, config.router_inner, width)
        self.k_proj = SwiGLU(width, config.router_inner, width)

    def forward(self, h: Tensor | None, ids: Tensor, cu_seqlens: Tensor) -> Routing:
        """Route packed bytes.

        Args:
            h: [T, d_core], the encoder's output, which a split router does without.
            ids: uint8 [T], the bytes.
            cu_seqlens: int32 [S+1].
        """
        return self.route(self.read(h, ids, cu_seqlens), ids, cu_seqlens)

    def read(self, h: Tensor | None, ids: Tensor, cu_seqlens: Tensor, states: list[BlockState] | None = None) -> Tensor:
        """What the router reads of each byte, d_r wide: h [T, d_core], or its own encoder's output [T, d].

        The states of its own encoder's blocks after each sequence are added to ``states``.

        Raises:
            ValueError: there is no h, and the router has no encoder of its own.
        """
        if self.encoder is not None:
            return self.encoder(ids, cu_seqlens, states)
        if h is None:
            raise ValueError("h must be the encoder's output, got None: only router='split' does without")
        return h

    def route(self, read: Tensor, ids: Tensor, cu_seqlens: Tensor, *, capacity: int | None = None) -> Routing:
        """As :meth:`forward`, from what the router has read, [T, d_r]; ``capacity``: room for so many chunks."""
        return bytekernels.route(
            self.q_proj(read), self.k_proj(read), cu_seqlens, lookahead=self.lookahead, required=ids == BOS,
            capacity=capacity,
        )  # fmt: skip

    def pair(self, read: Tensor, following: Tensor) -> Tensor:
        """Probability that a chunk ends on a byte, from what is read of it and of the one after it, maybe a draft.

        ``(1 - cos(q(read), k(following))) / 2``, as :meth:`forward` has it inside a sequence where the router looks
        ahead; a chunk ends where it is at least 0.5. The rows are independent, and the host does not wait for the
        device.

        Args:
            read: [S, d_r], what the router reads (:meth:`read`) of S bytes.
            following: [S, d_r], of the bytes after them.

        Returns:
            float32 [S] (float64 where the states are).

        Raises:
            ValueError: read and following differ in shape.
        """
        if read.shape != following.shape:
            raise ValueError(f"following must have read's shape {list(read.shape)}, got {list(following.shape)}")
        # One sequence of S+1 rows, with k a row late: row s of q meets row s+1 of k, which is the s-th of following.
        q, k = F.pad(self.q_proj(read), (0, 0, 0, 1)), F.pad(self.k_proj(following), (0, 0, 1, 0))
        rows = q.shape[0]
        cu_seqlens = torch.arange(0, rows + 1, rows, dtype=torch.int32, device=q.device)
        return bytekernels.route(q, k, cu_seqlens, capacity=0).prob[:-1]
