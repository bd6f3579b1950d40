"""linear_kl: the chunked form against the plain one and torch's own KL, its memory, its gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bytekernels
from bytekernels import dispatch
from bytekernels.linear_kl import chunked, op, reference
from bytekernels.testing import TOLERANCE, assert_close, gradients, poisoned_memory

DIRECTIONS = ["reverse", "forward"]


def make(rows=9, vocabulary=17, width=5, teacher_width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [normal(rows, width).requires_grad_(), normal(vocabulary, width).requires_grad_()]
    return [*student, normal(rows, teacher_width), normal(vocabulary, teacher_width)]


def by_torch(student_h, student_W, teacher_h, teacher_W, direction, temperature):
    student = (student_h @ student_W.T / temperature).log_softmax(-1)
    teacher = (teacher_h @ teacher_W.T / temperature).log_softmax(-1)
    left, right = (student, teacher) if direction == "reverse" else (teacher, student)
    return temperature**2 * F.kl_div(right, left, log_target=True, reduction="batchmean")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 12),
    vocabulary=st.integers(1, 20),
    chunk_rows=st.integers(1, 14),
    direction=st.sampled_from(DIRECTIONS),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_any_chunk_size_gives_torchs_divergence(rows, vocabulary, chunk_rows, direction, temperature):
    values = make(rows, vocabulary)
    with poisoned_memory():
        loss = bytekernels.linear_kl(*values, direction=direction, temperature=temperature, chunk_rows=chunk_rows)
        got = torch.autograd.grad(3 * loss, values[:2])
    expected = by_torch(*values, direction, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for value, want in zip(got, torch.autograd.grad(3 * expected, values[:2]), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_plain_form_can_be_forced(direction):
    values = make()
    with dispatch.force("reference"):
        plain = bytekernels.linear_kl(*values, direction=direction, temperature=2.0)
    by_rows = bytekernels.linear_kl(*values, direction=direction, temperature=2.0, chunk_rows=4)
    assert_close(by_rows, plain)
    for got, want in zip(gradients(by_rows, values[:2]), gradients(plain, values[:2]), strict=True):
        assert_close(got, want, what="gradient")


def test_equal_heads_have_no_divergence():
    h, weight, _, _ = make(dtype=torch.float32)
    for direction in DIRECTIONS:
        loss = bytekernels.linear_kl(h, weight, h.detach(), weight.detach(), direction=direction)
        assert abs(loss.item()) < 1e-6
        assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss, (h, weight)))


def test_no_rows_give_zero():
    values = make(rows=0)
    loss = bytekernels.linear_kl(*values)
    assert loss.item() == 0
    dh, dweight = torch.autograd.grad(loss, values[:2])
    assert dh.shape == (0, 5)
    assert not dweight.any()


class Made(TorchDispatchMode):
    """The most elements that one tensor of each dtype has."""

    def __init__(self):
        super().__init__()
        self.most = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.most[value.dtype] = max(self.most.get(value.dtype, 0), value.numel())
        return out


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_of_rows_times_vocabulary_is_made(direction, with_gradients, monkeypatch):
    rows, vocabulary, chunk_rows, tile_rows = 64, 50, 16, 4
    monkeypatch.setattr(chunked, "TILE_ROWS", tile_rows)
    values = make(rows, vocabulary, width=1, teacher_width=1, dtype=torch.bfloat16)
    call = (*values, direction == "reverse", 2.0, chunk_rows, with_gradients)
    with Made() as chunks:
        chunked.linear_kl(*call)
    with Made() as plain:
        reference.linear_kl(*call)
    kept = chunk_rows if with_gradients else tile_rows
    assert chunks.most == {torch.bfloat16: kept * vocabulary, torch.float32: tile_rows * vocabulary}
    assert plain.most[torch.float32] == rows * vocabulary


def test_chunks_are_equal_and_none_is_above_the_limit():
    for total, most, size in ((0, 4, 1), (1, 4, 1), (4, 4, 4), (5, 4, 3), (4096, 2048, 2048), (4097, 2048, 1366)):
        assert chunked._equal_parts(total, most) == size


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("chunk_rows", "temperature"), [(2048, 1.0), (2048, 0.5), (300, 1.0), (7, 3.0)])
def test_float32_stays_within_1e_5_where_distributions_are_peaked(direction, chunk_rows, temperature):
    """Logits to +-50 that float32 holds exactly, so that nothing is measured but the divergence's own rounding."""
    generator = torch.Generator().manual_seed(0)

    def multiples(*shape, most, of):
        return of * torch.randint(-most, most + 1, shape, generator=generator).double()

    truth = [
        multiples(601, 8, most=4, of=1.0).requires_grad_(),
        multiples(333, 8, most=150, of=2.0**-6).requires_grad_(),
        multiples(601, 8, most=4, of=1.0),
        multiples(333, 8, most=150, of=2.0**-6),
    ]
    assert 35 < (truth[0] @ truth[1].T).max() <= 50
    values = [value.detach().float().requires_grad_(value.requires_grad) for value in truth]
    settings = dict(direction=direction, temperature=temperature)
    expected = bytekernels.linear_kl(*truth, **settings)
    loss = bytekernels.linear_kl(*values, **settings, chunk_rows=chunk_rows)
    assert_close(loss, expected, what="loss")
    for name, got, want in zip("hW", gradients(loss, values[:2]), gradients(expected, truth[:2]), strict=True):
        assert_close(got, want, what=f"gradient of student_{name}")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_has_no_probability_in_float32_adds_nothing(direction):
    h, teacher_h = torch.tensor([[1.0]]), torch.tensor([[-1.0]])
    weight = torch.tensor([[150.0], [0.0], [-150.0]])
    values = [h.requires_grad_(), weight.clone().requires_grad_()]
    loss = bytekernels.linear_kl(*values, teacher_h, weight, direction=direction)
    assert_close(loss, torch.tensor(300.0))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, values))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_stay_within_tolerance(dtype, direction):
    values = make(300, 40, width=16, teacher_width=24, dtype=dtype)
    with torch.no_grad():
        values[0] *= 0.25  # logits of order 1: rounding them to bf16 is then the only error of note
        values[2] *= 0.2
    truth = [value.detach().double().requires_grad_() for value in values]
    loss = bytekernels.linear_kl(*values, direction=direction, chunk_rows=64)
    expected = bytekernels.linear_kl(*truth, direction=direction)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, dtype=dtype, what="loss")
    for name, got, want in zip(
        ("student_h", "student_W"), gradients(loss, values[:2]), gradients(expected, truth[:2]), strict=True
    ):
        assert got.dtype == dtype
        assert_close(got, want, what=f"d{name}")


@pytest.mark.parametrize(
    ("rows_dtype", "weight_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_a_weight_of_another_dtype_gets_its_own_gradient(rows_dtype, weight_dtype, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 16)  # of 40
    h, weight, teacher_h, teacher_W = make(20, 40, dtype=torch.bfloat16)
    h, teacher_h = h / 4, teacher_h / 4
    values = [h.detach().to(rows_dtype).requires_grad_(), weight.detach().to(weight_dtype).requires_grad_()]
    truth = [value.detach().double().requires_grad_() for value in values]
    loss = bytekernels.linear_kl(*values, teacher_h.to(rows_dtype), teacher_W.to(weight_dtype))
    expected = bytekernels.linear_kl(*truth, teacher_h.double(), teacher_W.double())
    for value, got, want in zip(values, gradients(loss, values), gradients(expected, truth), strict=True):
        assert got.dtype == value.dtype
        assert_close(got, want, limit=TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype, direction):
    values = make(600, 1000, width=32, teacher_width=48, dtype=dtype)
    with torch.no_grad():
        values[0] *= 0.18
        values[2] *= 0.14
    truth = [value.detach().double().requires_grad_() for value in values]
    expected = bytekernels.linear_kl(*truth, direction=direction)
    there = [value.detach().cuda().requires_grad_() for value in values]
    loss = bytekernels.linear_kl(*there, direction=direction, chunk_rows=512)
    assert_close(loss.cpu(), expected, dtype=dtype, what="loss")
    for got, want in zip(torch.autograd.grad(loss, there[:2]), torch.autograd.grad(expected, truth[:2]), strict=True):
        assert_close(got.cpu(), want, what="gradient")


@pytest.mark.parametrize("forced", ["chunked", "reference"])
def test_master_weights_under_autocast(forced):
    h, weight, teacher_h, teacher_W = make(dtype=torch.float32)
    narrow = h.detach().bfloat16().requires_grad_()
    with dispatch.force(forced):
        with torch.autocast("cpu", torch.bfloat16):
            loss = bytekernels.linear_kl(narrow, weight, teacher_h, teacher_W)
        cast = bytekernels.linear_kl(narrow, weight.bfloat16(), teacher_h.bfloat16(), teacher_W)
    assert torch.equal(loss, cast)
    dh, dweight = torch.autograd.grad(loss, (narrow, weight))
    assert (dh.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    assert math.isfinite(loss.item())


def test_no_gradient_is_made_unless_needed():
    values = make()
    with torch.no_grad():
        assert not bytekernels.linear_kl(*values).requires_grad
    loss, dh, dweight = op.linear_kl_op(*(v.detach() for v in values), True, 1.0, 4, False)
    assert dh.numel() == dweight.numel() == 0
    assert_close(loss, bytekernels.linear_kl(*values))
    for value in values[2:]:
        value.requires_grad_()
    with pytest.raises(RuntimeError, match="not have been used|does not require"):
        torch.autograd.grad(bytekernels.linear_kl(*values), values[2:])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction):
    student_h, student_W, teacher_h, teacher_W = make(rows=5, vocabulary=6, width=3)

    def plain(h, weight):
        return reference.divergence(h, weight, teacher_h, teacher_W, direction == "reverse", 1.5)

    def through_op(h, weight):
        return bytekernels.linear_kl(
            h, weight, teacher_h, teacher_W, direction=direction, temperature=1.5, chunk_rows=2
        )

    assert torch.autograd.gradcheck(plain, (student_h, student_W))
    assert torch.autograd.gradcheck(through_op, (student_h, student_W))


@pytest.mark.parametrize("rows", [0, 5])
def test_opcheck(rows):
    values = make(rows, dtype=torch.float32)
    torch.library.opcheck(op.linear_kl_op, (*values, True, 1.0, 4, True))
    torch.library.opcheck(op.linear_kl_op, (*(v.detach() for v in values), False, 2.0, 4, False))


def test_arguments_are_checked():
    student_h, student_W, teacher_h, teacher_W = make()
    with pytest.raises(ValueError, match=r"with one n, got \[9, 5\] and \[8, 4\]"):
        bytekernels.linear_kl(student_h, student_W, teacher_h[:8], teacher_W)
    with pytest.raises(ValueError, match=r"teacher_W must have shape \[V, 4\] as teacher_h does, got \[17, 3\]"):
        bytekernels.linear_kl(student_h, student_W, teacher_h, teacher_W[:, :3])
    with pytest.raises(ValueError, match="got 17 rows in student_W and 16 in teacher_W"):
        bytekernels.linear_kl(student_h, student_W, teacher_h, teacher_W[:16])
    with pytest.raises(ValueError, match="direction must be 'reverse' or 'forward', got 'both'"):
        bytekernels.linear_kl(student_h, student_W, teacher_h, teacher_W, direction="both")
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        bytekernels.linear_kl(student_h, student_W, teacher_h, teacher_W, temperature=0)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        bytekernels.linear_kl(student_h, student_W, teacher_h, teacher_W, chunk_rows=0)
