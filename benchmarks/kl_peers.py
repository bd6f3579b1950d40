"""What linear_kl is measured against.

``eager`` is the plain form: both heads' logits, their log-softmax in float32, ``kl_div``, under PyTorch's own autograd.
``compile`` is the same under ``torch.compile``. ``liger`` is liger-kernel's fused linear JSD, which goes through the
rows in chunks too and at beta = 1 is the reverse divergence; it sums the weight's gradient in float32, as ours does.
``bytekernels`` is the public function with the implementation that it chooses.

Every function takes its op's arguments by name and returns its outputs by name.
"""

import functools
import importlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bytekernels
from benchmarks import peers, public
from benchmarks.harness import Function, Provider, Unavailable
from bytekernels.linear_kl import reference

OPS = ("reverse", "forward")
PROVIDERS = ("eager", "compile", "liger", "bytekernels")
TRUTH_ROWS = 128  # whose logits the truth has in memory, in float64

# student_h [n, d], student_W [V, d], teacher_h [n, e], teacher_W [V, e] -> loss, a scalar
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by(divergence: Divergence) -> Function:
    def function(student_h: Tensor, student_W: Tensor, teacher_h: Tensor, teacher_W: Tensor) -> dict[str, Tensor]:
        return dict(loss=divergence(student_h, student_W, teacher_h, teacher_W))

    return function


def plain(direction: str, student_h: Tensor, student_W: Tensor, teacher_h: Tensor, teacher_W: Tensor) -> Tensor:
    teacher = (teacher_h @ teacher_W.T).log_softmax(-1, dtype=torch.float32)  # [n, V]
    student = (student_h @ student_W.T).log_softmax(-1, dtype=torch.float32)
    of, to = (student, teacher) if direction == "reverse" else (teacher, student)
    return F.kl_div(to, of, log_target=True, reduction="batchmean")


def specification(direction: str, student_h: Tensor, student_W: Tensor, teacher_h: Tensor, teacher_W: Tensor) -> Tensor:
    """Some rows at a time: in float64 all rows' logits would not fit in memory."""
    rows = zip(student_h.split(TRUTH_ROWS), teacher_h.split(TRUTH_ROWS), strict=True)
    reverse, sums = direction == "reverse", []
    for student, teacher in rows:
        arguments = (student, student_W, teacher, teacher_W, reverse, 1.0)
        sums.append(len(student) * checkpoint(reference.divergence, *arguments, use_reentrant=False))
    return torch.stack(sums).sum() / len(student_h)


def ours(direction: str, student_h: Tensor, student_W: Tensor, teacher_h: Tensor, teacher_W: Tensor) -> Tensor:
    return bytekernels.linear_kl(student_h, student_W, teacher_h, teacher_W, direction=direction)


def liger(direction: str, student_h: Tensor, student_W: Tensor, teacher_h: Tensor, teacher_W: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    beta = 1.0 if direction == "reverse" else 0.0
    loss = LigerFusedLinearJSD(jsd_beta=beta, accum_dtype=torch.float32)
    return loss(student_h, student_W, teacher_h, teacher_W, None)


def of_both_directions(form: Callable[..., Tensor]) -> dict[str, Function]:
    return {direction: by(functools.partial(form, direction)) for direction in OPS}


TRUTH = Provider(of_both_directions(specification))
EAGER = Provider(of_both_directions(plain))
OURS = Provider(of_both_directions(ours))


def providers(names: Iterable[str], device: torch.device) -> dict[str, Provider | Unavailable]:
    """The providers of these names, those that can't run on this device with the reason."""
    made: dict[str, Callable[[], Provider | Unavailable]] = {
        "eager": lambda: EAGER,
        "compile": lambda: peers.compiled(EAGER.functions, device),
        "liger": lambda: _liger(device),
        "bytekernels": lambda: OURS,
    }
    return {name: made[name]() for name in names}


def _liger(device: torch.device) -> Provider | Unavailable:
    if device.type != "cuda":
        return Unavailable(f"liger-kernel's Triton kernels run on CUDA devices alone, not on {device}")
    load = functools.partial(importlib.import_module, "liger_kernel.transformers.fused_linear_jsd")
    return public.missing(load, "liger-kernel", "liger-kernel") or Provider(of_both_directions(liger))
