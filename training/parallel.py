"""From one process to many nodes: torchrun's processes, their mesh, and FSDP2 over it."""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from training.errors import UserError

PATIENCE = timedelta(hours=12)  # the ranks wait while rank 0 reads and aligns the text
COLLECTIVES = timedelta(minutes=10)  # no step of the loop takes nearly as long: a rank that stays away is gone


@dataclass(frozen=True)
class Ranks:
    """This process among its peers.

    Attributes:
        rank: this process, from 0.
        size: number of processes.
        device: where it computes.
        waiting: group of all processes for waits on the host that may take hours; None alone.
        saving: group of all processes for checkpoints that are written beside the training; None alone.
    """

    rank: int
    size: int
    device: torch.device
    waiting: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every rank, in the ranks' order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.waiting)
        return values

    def barrier(self) -> None:
        """Wait for all ranks, for hours if need be."""
        if self.size > 1:
            dist.barrier(group=self.waiting)

    def mesh(self, shard: int) -> DeviceMesh:
        """All ranks in two dimensions, (replicate, shard), or in one where no part is repeated.

        Args:
            shard: ranks that hold a model's parts between them; 0 for all of them.

        Raises:
            UserError: it does not divide the number of ranks.
        """
        shard = shard or self.size
        if shard == self.size:
            return init_device_mesh(self.device.type, (shard,), mesh_dim_names=("shard",))
        if self.size % shard:
            raise UserError(
                f"parallel.shard={shard} does not divide the {self.size} processes: use a divisor, or 0 for all of them"
            )
        return init_device_mesh(self.device.type, (self.size // shard, shard), mesh_dim_names=("replicate", "shard"))


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
        if (where.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"{where} is not there: this machine has {torch.cuda.device_count()} CUDA devices, and torchrun's "
                "--nproc-per-node must be no more"
            )
        torch.cuda.set_device(where)
    elif kind == "cpu":
        where = torch.device("cpu")
    else:
        raise UserError(f"--device {kind}: use cuda or cpu")
    if size == 1:
        return Ranks(rank, size, where)
    if not dist.is_initialized():
        # torchrun's workers may share its agent's store, where a restarted one would find the addresses of the dead.
        # Agents count their own restarts only: with several nodes it must not be shared at all (docs/cluster.md).
        store, _, _ = next(iter(dist.rendezvous("env://", timeout=COLLECTIVES)))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(f"attempt {restarts()}", store)
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVES)
    waiting, saving = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
    return Ranks(rank, size, where, waiting, saving)


def restarts() -> int:
    """How often torchrun has started this process anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def is_restarted(folder: Path) -> bool:
    """Whether this process's torchrun has begun this run before. To be asked once, by the first process.

    Args:
        folder: of the run, in which the job's name is kept.
    """
    job, kept = os.environ.get("TORCHELASTIC_RUN_ID", "none"), folder / ".job"
    if job == "none":  # not under torchrun, or under one that gives all jobs the same name
        return restarts() > 0
    before = kept.read_text() if kept.is_file() else None
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(job)
    return restarts() > 0 or job == before


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------- sharding


def shard_(root: nn.Module, mesh: DeviceMesh, narrow: torch.dtype | None, keep: tuple[type[nn.Module], ...]) -> None:
    """Cut a module's parameters over a mesh with FSDP2, in place: each block for itself, the root last.

    A block is an element of a ``ModuleList``: byte-level blocks, a transformer's layers. Gradients are averaged in
    fp32. Every computation must then go through ``root.forward``.

    Args:
        root: its parameters must be the same on every rank; they may be on the host, and go to the mesh's devices.
        mesh: (shard,) or (replicate, shard); parameters are cut over the one and repeated over the other.
        narrow: blocks are gathered, and compute, in this dtype beside fp32 masters; None for the masters' own.
        keep: blocks of these classes keep the masters' dtype all the same, as do the root's own parameters.
    """
    # A block may hand on what it was given, and FSDP warns of writing to it: nothing here writes in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    masters = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    narrowed = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32)
    for block in blocks_of(root):
        if not isinstance(block, FSDPModule):
            fully_shard(block, mesh=mesh, mp_policy=masters if isinstance(block, keep) else narrowed)
    fully_shard(root, mesh=mesh, mp_policy=masters, reshard_after_forward=False)


def full_state(module: nn.Module) -> dict[str, Tensor] | None:
    """All of a module's state on rank 0's host, asked for by every rank; None where nothing is cut."""
    if not any(isinstance(part, FSDPModule) for part in module.modules()):
        return None
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], state)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost ModuleLists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks_of(child)
