"""linear_kl as a torch.library op."""

from typing import Any

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.ragged import accumulation_dtype

_linear_kl = dispatch.Dispatch(
    "linear_kl",
    chunked=dispatch.Implementation("bytekernels.linear_kl.chunked"),
    reference=dispatch.reference("linear_kl"),
)


@torch.library.custom_op("bytekernels::linear_kl", mutates_args=())
def linear_kl_op(
    student_h: Tensor,
    student_W: Tensor,
    teacher_h: Tensor,
    teacher_W: Tensor,
    reverse: bool,
    temperature: float,
    chunk_rows: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(student_h.device.type, enabled=False):
        return _linear_kl(student_h, student_W, teacher_h, teacher_W, reverse, temperature, chunk_rows, with_gradients)


@linear_kl_op.register_fake
def _(student_h: Tensor, student_W: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_gradients = others[-1]
    loss = student_h.new_empty((), dtype=accumulation_dtype(student_h.dtype))
    if not with_gradients:
        return loss, student_h.new_empty(0), student_W.new_empty(0)
    return loss, torch.empty_like(student_h), torch.empty_like(student_W)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    if not inputs[-1]:
        raise RuntimeError("bytekernels::linear_kl was called without its gradients, and one of them is needed")
    _, dh, dweight = output
    ctx.mark_non_differentiable(dh, dweight)
    ctx.save_for_backward(dh, dweight)


def _backward(ctx: Any, dloss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    dh, dweight = ctx.saved_tensors
    return _scaled(dh, dloss), _scaled(dweight, dloss), None, None, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Rounded once: the factor may be a count of thousands, which a narrow dtype does not hold."""
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype)


linear_kl_op.register_autograd(_backward, setup_context=_setup_context)


def linear_kl(
    student_h: Tensor,
    student_W: Tensor,
    teacher_h: Tensor,
    teacher_W: Tensor,
    *,
    direction: str = "reverse",
    temperature: float = 1.0,
    chunk_rows: int = 2048,
) -> Tensor:
    """Mean KL divergence of the student head's distributions from the teacher's, some rows at a time.

    With ``s = softmax(student_h student_W^T / temperature)`` and t likewise: the mean over rows of
    ``temperature^2 KL(s || t)`` (``"reverse"``; Gu et al. 2024, arXiv 2306.08543) or ``temperature^2 KL(t || s)``
    (``"forward"``; Hinton et al. 2015, arXiv 1503.02531). The factor keeps gradients at one size for any temperature.

    Gradients go to student_h and student_W, never to the teacher. They are made together with the loss where grad mode
    is on and one of the two requires it, and kept in their inputs' dtypes until the backward pass scales them.

    Args:
        student_h: [n, d], a floating dtype. The matrix products are in it, or in autocast's dtype where autocast is on;
            the weight is cast to it. Softmax and sums are in float32, or float64 for float64.
        student_W: [V, d], in any floating dtype: fp32 master weights beside bf16 rows, say.
        teacher_h: [n, e], in its own dtype, likewise.
        teacher_W: [V, e].
        direction: ``"reverse"`` or ``"forward"``.
        temperature: above 0.
        chunk_rows: at most so many rows' gradients of the logits, [chunk_rows, V], are in memory at once.

    Returns:
        A scalar in nats, float32 (float64 for a float64 student); 0 for n = 0.

    Raises:
        ValueError: shapes that do not match, an unknown direction, or a temperature or chunk_rows that is not above 0.
    """
    if student_h.dim() != 2 or teacher_h.dim() != 2 or student_h.shape[0] != teacher_h.shape[0]:
        raise ValueError(
            "student_h and teacher_h must have shapes [n, d] and [n, e] with one n, "
            f"got {list(student_h.shape)} and {list(teacher_h.shape)}"
        )
    for name, weight, h in (("student", student_W, student_h), ("teacher", teacher_W, teacher_h)):
        if weight.dim() != 2 or weight.shape[1] != h.shape[1]:
            raise ValueError(f"{name}_W must have shape [V, {h.shape[1]}] as {name}_h does, got {list(weight.shape)}")
    if student_W.shape[0] != teacher_W.shape[0]:
        raise ValueError(
            f"both heads must have one vocabulary, got {student_W.shape[0]} rows in student_W "
            f"and {teacher_W.shape[0]} in teacher_W: cut both to the shared rows"
        )
    if direction not in ("reverse", "forward"):
        raise ValueError(f"direction must be 'reverse' or 'forward', got {direction!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    device = student_h.device.type
    if torch.is_autocast_enabled(device) and student_h.dtype != torch.float64:
        narrow = torch.get_autocast_dtype(device)
        student_h, teacher_h = student_h.to(narrow), teacher_h.to(narrow)
    with_gradients = torch.is_grad_enabled() and (student_h.requires_grad or student_W.requires_grad)
    loss, _, _ = linear_kl_op(
        student_h,
        student_W,
        teacher_h.detach(),
        teacher_W.detach(),
        direction == "reverse",
        temperature,
        chunk_rows,
        with_gradients,
    )
    return loss
