"""From chunks back to bytes, without telling a byte what comes after it."""

from collections.abc import Sequence

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
        weight = None
        if self.kind == "causal":
            weight = torch.sigmoid(self.weight_logits(bytekernels.gather_chunks(h, routing)))
        elif self.kind == "lookahead":
            weight = routing.prob[routing.index.long()]
        confidence = None
        if routing.prob.requires_grad:  # straight-through: the probability of what the router chose
            confidence = torch.where(routing.boundary, routing.prob, 1 - routing.prob)
        return bytekernels.dechunk(
            chunks, routing, weight=weight, null=self.null, residual=self.residual(h), confidence=confidence
        )

    def step(
        self, held: Tensor | None, chunks: Tensor, h: Tensor, rows: Sequence[int], first: Sequence[bool]
    ) -> Tensor:
        """Newest chunk state of S sequences after those in ``rows`` have finished a chunk.

        Args:
            held: [S, d_core], the states before.
            chunks: [len(rows), d_core], the finished chunks.
            h: [S, d_core], encoder states of the bytes that finished them.
            rows: the sequences that finished a chunk.
            first: for each of them, whether it is the sequence's first.

        Returns:
            [S, d_core]; ``held`` is left as it was.

        Raises:
            ValueError: the ``lookahead`` weight, which cannot be had when generating.
        """
        if self.kind == "lookahead":
            raise ValueError(
                "the 'lookahead' dechunk weight needs the next byte: train with dechunk='hold' or 'causal'"
            )
        state = (self.null.expand(h.shape[0], -1) if held is None else held).clone().to(chunks.dtype)
        if self.kind == "causal":
            weight = torch.sigmoid(self.weight_logits(h[list(rows)]))
            weight = torch.where(torch.tensor(list(first), dtype=torch.bool, device=weight.device), 1.0, weight)[
                :, None
            ]
            chunks = weight * chunks + (1 - weight) * state[list(rows)]
        state[list(rows)] = chunks.to(state.dtype)
        return state
