"""Muon, with its matrix products in the dtype that the device is fast at.

torch.optim.Muon always takes bf16, which a CPU without instructions for it multiplies a hundred times more slowly than
fp32.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from training.precision import fast_at_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic a x + b x^3 + c x^5 whose slope at zero is steep
STEPS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made nearly orthogonal (Jordan et al. 2024), scaled to AdamW's size (Liu et al. 2025,
    arXiv 2502.16982).

    With M the momentum and ``g + beta M`` Nesterov's look ahead (both as averages):
    ``W <- (1 - lr decay) W - 0.2 sqrt(max(m, n)) lr orthogonal(update)``.

    Args:
        params: matrices [m, n], or groups of them. Of a DTensor every process makes the whole matrix's update.
        lr: learning rate.
        weight_decay: of the weights, by step and unit of learning rate.
        momentum: beta, the share of the momentum that is kept.

    Raises:
        ValueError: a parameter that is no matrix.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon moves matrices only, got a parameter of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient. There is no closure to be evaluated again."""
        if closure is not None:
            raise ValueError("Muon takes no closure: leave it out")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                kept = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = _orthogonal_like(parameter.grad.lerp(kept, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])


def _orthogonal_like(update: Tensor) -> Tensor:
    if not isinstance(update, DTensor):
        return orthogonal(update).to(update.dtype)
    whole = orthogonal(update.full_tensor()).to(update.dtype)
    # Every process has the whole of it, and takes its own part without asking the others.
    return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T [m, n], nearly, by Newton-Schulz: singular values come out around 1 (0.6 to 1.25).

    In bf16 where the device is fast at it, else in float32.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(torch.bfloat16 if fast_at_bf16(matrix.device) else torch.float32)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
