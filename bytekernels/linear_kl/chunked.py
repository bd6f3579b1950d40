"""The KL divergence of two linear heads, some rows at a time: nothing of n·V elements is ever made.

The gradients are made beside the loss, where the probabilities are at hand, so that no logits are computed twice.
``chunk_rows`` rows share one product for the weight's gradient, which is read and written once for each chunk; of these
rows only the gradient of the logits is kept, in the products' dtype. What it is made from, the logits of student and
teacher in float32, is there for ``TILE_ROWS`` rows at a time.
"""

import torch
from torch import Tensor

from bytekernels.ragged import accumulation_dtype

TILE_ROWS = 256  # fewer would read the weights too often for the arithmetic of their products to cover it
BLOCK = 8192  # rows of a narrow weight's gradient that are rounded and widened at once


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
    num_rows = student_h.shape[0]
    chunk = _equal_parts(num_rows, chunk_rows if with_gradients else min(chunk_rows, TILE_ROWS))
    logits = student_h.new_empty(chunk, student_W.shape[0])  # [chunk, V], then their gradient
    for start in range(0, num_rows, chunk):
        end = min(start + chunk, num_rows)
        for first in range(start, end, TILE_ROWS):
            rows = slice(first, min(first + TILE_ROWS, end))
            tile = logits[first - start : rows.stop - start]  # [tile, V]
            teacher = _log_probabilities(teacher_h[rows] @ teacher_weight.T, temperature)
            student = _log_probabilities(torch.mm(student_h[rows], weight.T, out=tile), temperature)
            dtile, divergence = _reverse(student, teacher) if reverse else _forward(student, teacher)
            total += divergence.sum()
            tile.copy_(dtile)
            del student, teacher, dtile  # before the next tile's are made
        if with_gradients:
            dlogits = logits[: end - start]
            torch.mm(dlogits, weight, out=dh[start:end])
            _add_product(dweight, dlogits.T, student_h[start:end])
    if with_gradients:
        scale = temperature / max(num_rows, 1)
        dh.mul_(scale)
        dweight = dweight.mul_(scale).to(student_W.dtype)
    return temperature**2 * total / max(num_rows, 1), dh, dweight


def _equal_parts(total: int, most: int) -> int:
    """The size of equal parts (the last may be smaller), none above ``most``, as few as possible; at least 1."""
    return -(-total // max(-(-total // most), 1)) or 1


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature): [rows, V], new, in float32 at least. It may change the logits."""
    wide = accumulation_dtype(logits.dtype)
    if temperature != 1:
        logits = logits.to(wide).div_(temperature)
    return logits.log_softmax(-1, dtype=wide)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right. Where a narrow product can't be summed in a wide total at once, it is rounded, by blocks."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for start in range(0, total.shape[0], BLOCK):
            total[start : start + BLOCK] += left[start : start + BLOCK] @ right


def _reverse(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(s || t) of each row, and its gradient to the student's scaled logits, s (log s - log t - KL). In place."""
    terms = torch.sub(student, teacher, out=teacher)
    probability = student.exp_()
    divergence = terms.mul_(probability).sum(-1)
    return terms.addcmul_(probability, divergence[:, None], value=-1), divergence


def _forward(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) of each row, and its gradient to the student's scaled logits, s - t. In place."""
    probability = teacher.exp()
    divergence = teacher.sub_(student).mul_(probability).sum(-1)
    return student.exp_().sub_(probability), divergence
