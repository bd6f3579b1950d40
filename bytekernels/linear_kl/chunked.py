"""The KL divergence of two linear heads, some rows at a time: nothing of n·V elements is ever made.

The gradients are made beside the loss, where the probabilities are at hand, so that no logits are computed twice.
"""

import torch
from torch import Tensor

from bytekernels.linear_kl.reference import log_probabilities
from bytekernels.ragged import accumulation_dtype


@torch.no_grad()
def linear_kl(
    student_h: Tensor,
    student_W: Tensor,
    teacher_h: Tensor,
    teacher_W: Tensor,
    reverse: bool,
    temperature: float,
    chunk_rows: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients to student_h and student_W (empty unless asked for)."""
    wide = accumulation_dtype(student_h.dtype)
    weight, teacher_weight = student_W.to(student_h.dtype), teacher_W.to(teacher_h.dtype)
    total = torch.zeros((), dtype=wide, device=student_h.device)
    dh = torch.empty_like(student_h) if with_gradients else student_h.new_empty(0)
    dweight = torch.zeros_like(student_W, dtype=wide) if with_gradients else student_W.new_empty(0)
    rows = max(student_h.shape[0], 1)
    for start in range(0, student_h.shape[0], chunk_rows):
        chunk = slice(start, start + chunk_rows)
        h = student_h[chunk]
        student = log_probabilities(h, weight, temperature)
        teacher = log_probabilities(teacher_h[chunk], teacher_weight, temperature)
        dlogits, divergence = _reverse(student, teacher) if reverse else _forward(student, teacher)
        total += divergence.sum()
        if with_gradients:
            narrow = dlogits.to(h.dtype)
            dh[chunk] = (narrow @ weight).mul_(temperature / rows)
            dweight += narrow.T @ h
    if with_gradients:
        dweight = dweight.mul_(temperature / rows).to(student_W.dtype)
    return temperature**2 * total / rows, dh, dweight


def _reverse(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(s || t) of each row, and its gradient to the student's scaled logits, s (log s - log t - KL). In place."""
    probability = student.exp()
    ratio = student.sub_(teacher)
    divergence = torch.linalg.vecdot(probability, ratio)
    return ratio.sub_(divergence[:, None]).mul_(probability), divergence


def _forward(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) of each row, and its gradient to the student's scaled logits, s - t. In place."""
    probability = teacher.exp()
    divergence = torch.linalg.vecdot(probability, teacher.sub_(student))
    return student.exp_().sub_(probability), divergence
