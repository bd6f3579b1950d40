"""From chunks back to bytes, without telling a byte what comes after it."""

import torch
from torch import Tensor, nn

import bytekernels
from bytekernels import Routing
from models.config import ByteLMConfig


class Dechunk(nn.Module):
    """Each byte reads the newest chunk that is finished, through an EMA over chunks, plus a residual from the encoder.

    ``z_m = w_m c_m + (1 - w_m) z_{m-1}``, ``u_t = z_{chunk_of[t]} + W h_t`` (Hwang et al. 2025, equation 5 onwards).
    The weight w is 1 (``hold``), a function of the boundary byte's own state (``causal``), or the router's
    probability (``lookahead``), which is a function of the byte that comes next and therefore leaks it.
    """

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        width = config.core_width
        self.kind = config.dechunk
        self.null = nn.Parameter(torch.zeros(width))
        self.residual = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.residual.weight)
        if self.kind == "causal":
            self.weight_head = nn.Linear(width, 1)

    def weight_logits(self, h: Tensor) -> Tensor:
        """Logit of "a chunk ends here" from the byte's own state: [T, d_core] to fp32 [T] (``causal`` only)."""
        return self.weight_head(h).squeeze(-1).float()

    def forward(self, chunks: Tensor, h: Tensor, routing: Routing) -> Tensor:
        """[M, d_core] chunks and [T, d_core] encoder states to [T, d_core]."""
        return self._spread(chunks, h, routing, self.residual(h))

    def held(self, chunks: Tensor, h: Tensor, routing: Routing) -> Tensor:
        """What each byte reads without the residual, z or null: [T, d_core]."""
        return self._spread(chunks, h, routing, None)

    def _spread(self, chunks: Tensor, h: Tensor, routing: Routing, residual: Tensor | None) -> Tensor:
        weight = None
        if self.kind == "causal":
            weight = torch.sigmoid(self.weight_logits(bytekernels.gather_chunks(h, routing)))
        elif self.kind == "lookahead":
            weight = routing.prob[routing.index.long()]
        confidence = None
        if routing.prob.requires_grad:  # straight-through: the router's probability of the bits that hold
            confidence = torch.where(routing.boundary, routing.prob, 1 - routing.prob)
        return bytekernels.dechunk(
            chunks, routing, weight=weight, null=self.null, residual=residual, confidence=confidence
        )

    def check_causal(self) -> None:
        """Raise a ValueError for the ``lookahead`` weight, which cannot be had when generating, and leaks in scores."""
        if self.kind == "lookahead":
            raise ValueError(
                "dechunk='lookahead' tells each byte about the one it predicts, so the model can't generate and has no "
                "likelihood: train with dechunk='hold' or 'causal'"
            )

    def step(self, held: Tensor, chunks: Tensor, h: Tensor, closed: Tensor, first: Tensor) -> Tensor:
        """What S sequences hold after some of them have finished a chunk.

        Args:
            held: [S, d_core], z before.
            chunks: [S, d_core], the finished chunks; the rows of other sequences mean nothing.
            h: [S, d_core], encoder states of the bytes that finished them.
            closed: bool [S], who finished a chunk.
            first: bool [S], whose chunk is the sequence's first.

        Returns:
            [S, d_core] in held's dtype; ``held`` is left as it was.

        Raises:
            ValueError: the ``lookahead`` weight, which cannot be had when generating.
        """
        self.check_causal()
        if self.kind == "causal":
            vectors = self.weight_logits(h)[:, None].repeat(1, 32)  # a sigmoid of the last n % 32 rounds otherwise
            weight = torch.sigmoid(vectors)[:, :1].masked_fill(first[:, None], 1.0)
            chunks = weight * chunks + (1 - weight) * held
        return torch.where(closed[:, None], chunks.to(held.dtype), held)
