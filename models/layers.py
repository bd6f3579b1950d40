"""Small pieces that several parts of the model share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bytekernels


class RMSNorm(nn.Module):
    """RMS norm with a learned weight, and the residual sum that comes before it (:func:`bytekernels.rms_norm`)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return bytekernels.rms_norm(x, self.weight, residual, eps=self.eps)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv 2002.05202): [..., d_in] to [..., d_out]."""

    def __init__(self, d_in: int, inner: int, d_out: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_in, 2 * inner, bias=False)
        self.down = nn.Linear(inner, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ByteEmbedding(nn.Module):
    """A row of 256 for each byte: uint8 [T] to [T, d]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, width) * 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return bytekernels.byte_table(ids, self.weight)
