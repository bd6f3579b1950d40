"""Who moves the weights: AdamW, or Muon for the matrices beside it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import UserError
from training.muon import Muon
from training.recipe import OptimizerRecipe, StageRecipe
from training.snapshot import Saved


class Optimizer:
    """One or two optimizers as one. Each group's rate is the stage's times the group's ``scale``.

    Args:
        parts: optimizers that share out the parameters.
        names: a name for each parameter, by which its state is kept.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer], names: Mapping[nn.Parameter, str]) -> None:
        self.parts, self.names = parts, names

    def step(self, lr: float) -> None:
        """Move the weights at this learning rate and drop their gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * group["scale"]
            part.step()
            part.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Drop the gradients, and move nothing."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """What the optimizers remember, as ``parameter's name/what``; shares their memory."""
        return {
            f"{self.names[parameter]}/{what}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for what, value in state.items()
        }

    def blank(self, saved: Mapping[str, Saved]) -> dict[str, Tensor]:
        """Tensors to be filled with what :meth:`tensors` gave elsewhere, cut as this process's parameters are."""
        owners = {name: parameter for parameter, name in self.names.items()}
        blank = {}
        for key, (size, dtype) in saved.items():
            parameter = owners.get(key.rpartition("/")[0])
            if parameter is None:
                continue
            like = parameter.shape == size
            blank[key] = (
                torch.zeros_like(parameter, dtype=dtype)
                if like
                else torch.zeros(size, dtype=dtype, device=parameter.device)
            )
        return blank

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`blank` made and a snapshot filled."""
        owners = {
            parameter: part for part in self.parts for group in part.param_groups for parameter in group["params"]
        }
        for parameter, name in self.names.items():
            own = {key.rpartition("/")[2]: tensor for key, tensor in tensors.items() if key.rpartition("/")[0] == name}
            if own:
                owners[parameter].state[parameter] = own


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], recipe: OptimizerRecipe, stage: StageRecipe) -> Optimizer:
    """An optimizer for named parameters, with decay on matrices only.

    Norms, biases, A_log, D, dt_bias, convolutions and embeddings are spared. With ``kind = "muon"`` the matrices but
    for the output heads go to Muon (Jordan et al. 2024), its update scaled to AdamW's size (Liu et al. 2025, arXiv
    2502.16982), so that both share a learning rate.

    Raises:
        UserError: a prefix in ``lr_scale`` that no trained parameter begins with.
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    names: dict[nn.Parameter, str] = {}
    unused = set(stage.lr_scale)
    for name, parameter in named:
        names[parameter] = name
        prefixes = [prefix for prefix in stage.lr_scale if name.startswith(prefix)]
        unused -= set(prefixes)
        scale = stage.lr_scale[max(prefixes, key=len)] if prefixes else 1.0
        decays = parameter.ndim == 2 and "embed" not in name
        by_muon = recipe.kind == "muon" and decays and not name.endswith("head.weight")
        groups.setdefault((by_muon, scale, decays), []).append(parameter)
    if unused:
        raise UserError(f"lr_scale: no trained parameter begins with {sorted(unused)[0]!r}")

    def of(wanted: bool) -> list[dict[str, Any]]:
        return [
            {"params": parameters, "weight_decay": recipe.weight_decay if decays else 0.0, "scale": scale}
            for (by_muon, scale, decays), parameters in groups.items()
            if by_muon is wanted
        ]

    parts: list[torch.optim.Optimizer] = []
    if of(False):
        betas = (recipe.beta1, recipe.beta2)
        parts.append(torch.optim.AdamW(of(False), lr=stage.lr, betas=betas, fused=True))
    if of(True):
        parts.append(Muon(of(True), lr=stage.lr))
    return Optimizer(parts, names)
