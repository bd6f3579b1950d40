"""Root-mean-square norms in plain PyTorch: the specification.

``rms(x) = x / sqrt(mean(x^2) + eps) * weight`` (Zhang & Sennrich 2019, arXiv 1910.07467, equation 4).
"""

from torch import Tensor
from torch.nn import functional as F

from bytekernels import dispatch
from bytekernels.ragged import accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.to(residual.dtype) + residual
    return rms_norm(total, weight, eps).to(x.dtype), total


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    wide = accumulation_dtype(y.dtype)
    gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (-1, group_size))  # [T, D/group_size, group_size]
    scale = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((gated * scale).flatten(-2) * weight).to(y.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return dispatch.vjp(rms_norm, (x, weight, eps), (dy,))


def add_rms_norm_backward(
    dy: Tensor, dtotal: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> list[Tensor]:
    return dispatch.vjp(add_rms_norm, (x, residual, weight, eps), (dy, dtotal))


def gated_rms_norm_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
) -> list[Tensor]:
    return dispatch.vjp(gated_rms_norm, (y, z, weight, group_size, eps), (dout,))
