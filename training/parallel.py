"""One code path from a single process to many: what torchrun gives, and the sums that ranks share."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.errors import UserError

PATIENCE = timedelta(hours=12)  # the ranks wait while rank 0 reads and aligns the text


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: this process, from 0.
        size: number of processes.
        device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers."""
        if self.size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, src=0)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], divisor: Tensor) -> None:
        """Sum gradients over ranks, then divide by ``divisor`` (a scalar that every rank shares)."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])
        torch._foreach_div_(gradients, divisor.to(gradients[0].dtype))


def start(device: str | None = None) -> Ranks:
    """Join the processes that torchrun started (alone without it) and choose this one's device.

    Raises:
        UserError: a device that is not there.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"--device {kind}: no CUDA device is usable here; use --device cpu")
        if size > 1 and kind != "cuda":
            raise UserError(f"--device {kind}: torchrun gives each process its own device; use --device cuda")
        where = torch.device("cuda", local) if kind == "cuda" else torch.device(kind)
        torch.cuda.set_device(where)
    elif kind == "cpu":
        where = torch.device("cpu")
    else:
        raise UserError(f"--device {kind}: use cuda or cpu")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(rank, size, where)


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
