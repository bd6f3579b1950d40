"""KL divergence of two linear heads in plain PyTorch: the specification.

With ``s = softmax(student_h student_W^T / tau)`` and t likewise, the mean over rows of ``tau^2 KL(s || t)`` (reverse;
Gu et al. 2024, arXiv 2306.08543) or ``tau^2 KL(t || s)`` (forward; Hinton et al. 2015, arXiv 1503.02531).
"""

from torch import Tensor

from bytekernels import dispatch
from bytekernels.ragged import accumulation_dtype


def log_probabilities(h: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """log softmax(h weight^T / temperature): [n, V] in float32 at least; the product is in h's dtype."""
    logits = h @ weight.to(h.dtype).T
    return (logits.to(accumulation_dtype(h.dtype)) / temperature).log_softmax(-1)


def divergence(
    student_h: Tensor, student_W: Tensor, teacher_h: Tensor, teacher_W: Tensor, reverse: bool, temperature: float
) -> Tensor:
    student = log_probabilities(student_h, student_W, temperature)
    teacher = log_probabilities(teacher_h, teacher_W, temperature)
    left, right = (student, teacher) if reverse else (teacher, student)
    rows = (left.exp() * (left - right)).sum(-1)
    return temperature**2 * rows.sum() / max(len(rows), 1)


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
    """The loss and its gradients to student_h and student_W (empty unless asked for); all rows are one chunk."""

    def loss_of(student_h: Tensor, student_W: Tensor) -> Tensor:
        return divergence(student_h, student_W, teacher_h, teacher_W, reverse, temperature)

    loss = loss_of(student_h, student_W)
    if not with_gradients:
        return loss, student_h.new_empty(0), student_W.new_empty(0)
    dh, dweight = dispatch.vjp(loss_of, (student_h, student_W), (loss.new_ones(()),))
    return loss, dh, dweight
