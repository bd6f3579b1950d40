"""The specification of routing against a loop over bytes; its gradients, its capacity, its arguments."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels.route import op, reference
from bytekernels.testing import assert_close, gradients, poisoned_memory, ragged, ragged_lengths


def make(rows, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return [value.to(dtype).requires_grad_() for value in values]


def by_hand(boundary, cu):
    """chunk_of, index and cu_chunks by a loop over sequences and bytes."""
    chunk_of, index, cu_chunks = [], [], [0]
    for start, stop in itertools.pairwise(cu):
        newest = -1
        for t in range(start, stop):
            if boundary[t]:
                newest = len(index)
                index.append(t)
            chunk_of.append(newest)
        cu_chunks.append(len(index))
    return chunk_of, index, cu_chunks


@settings(max_examples=40, deadline=None)
@given(lengths=ragged_lengths(), lookahead=st.booleans())
def test_route_is_a_loop_over_bytes(lengths, lookahead):
    cu, total = ragged(lengths)
    q, k = make(total)
    with poisoned_memory():
        routing = bytekernels.route(q, k, cu, lookahead=lookahead)
    for start, stop in itertools.pairwise(cu.tolist()):
        for t in range(start, stop):
            left, right = (t, t + 1) if lookahead else (t - 1, t)
            if left < start or right >= stop:
                assert routing.prob[t] == 1
            else:
                cosine = torch.nn.functional.cosine_similarity(q[left], k[right], dim=0)
                torch.testing.assert_close(routing.prob[t], (1 - cosine) / 2)
    assert torch.equal(routing.boundary, routing.prob >= 0.5)
    chunk_of, index, cu_chunks = by_hand(routing.boundary.tolist(), cu.tolist())
    assert routing.chunk_of.tolist() == chunk_of
    assert routing.index.tolist() == index
    assert routing.cu_chunks.tolist() == cu_chunks
    assert {t.dtype for t in (routing.chunk_of, routing.index, routing.cu_chunks)} == {torch.int32}


@settings(max_examples=40, deadline=None)
@given(lengths=ragged_lengths(), data=st.data())
def test_any_boundaries_give_their_layout(lengths, data):
    cu, total = ragged(lengths)
    boundary = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), dtype=torch.bool)
    with poisoned_memory():
        routing = bytekernels.routing_of(boundary, cu)
    chunk_of, index, cu_chunks = by_hand(boundary.tolist(), cu.tolist())
    assert (routing.chunk_of.tolist(), routing.index.tolist(), routing.cu_chunks.tolist()) == (
        chunk_of,
        index,
        cu_chunks,
    )
    assert torch.equal(routing.prob, boundary.float())


def test_no_sequences_at_all():
    cu = torch.zeros(1, dtype=torch.int32)
    routing = bytekernels.route(*make(0), cu)
    assert [t.shape[0] for t in routing] == [0, 0, 0, 0, 1]
    assert bytekernels.gather_chunks(torch.zeros(0, 3), routing).shape == (0, 3)


@pytest.mark.parametrize("lookahead", [True, False])
def test_forced_boundaries_pass_no_gradient(lookahead):
    cu, total = ragged([1, 4])
    q, k = make(total)
    prob = bytekernels.route(q, k, cu, lookahead=lookahead).prob
    forced = [0, 4] if lookahead else [0, 1]
    for grad in torch.autograd.grad(prob[forced].sum(), (q, k)):
        assert not grad.any()


def test_zero_rows_have_a_finite_and_true_gradient():
    cu, total = ragged([3])
    q, k = make(total)
    with torch.no_grad():
        q[0], k[2] = 0, 0
    prob = bytekernels.route(q, k, cu).prob
    assert prob[:2].tolist() == [0.5, 0.5]  # orthogonal to everything
    dq, dk = torch.autograd.grad(prob.sum(), (q, k))
    scale = 0.5 / reference.EPS**0.5  # d cos(x, y) / dx at x = 0 is y / (|y| sqrt(eps))
    torch.testing.assert_close(dq[0], -scale * k[1] / k[1].norm())
    torch.testing.assert_close(dk[2], -scale * q[1] / q[1].norm())
    step = 1e-9
    with torch.no_grad():
        q[0, 1] += step
    measured = (bytekernels.route(q, k, cu).prob[0] - 0.5) / step
    torch.testing.assert_close(measured, dq[0, 1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_stay_within_tolerance(dtype):
    cu, total = ragged([33, 1, 0, 30])
    q, k = make(total, width=64, dtype=dtype)
    truth = [value.detach().double().requires_grad_() for value in (q, k)]
    prob, expected = bytekernels.route(q, k, cu).prob, bytekernels.route(*truth, cu).prob
    assert prob.dtype == torch.float32
    assert ((prob >= 0) & (prob <= 1)).all()
    assert_close(prob, expected, what="prob")
    for name, got, want in zip("qk", gradients(prob, (q, k)), gradients(expected, truth), strict=True):
        assert_close(got, want, what=f"d{name}")


def test_prob_stays_within_zero_and_one():
    q, _ = make(64, width=7, dtype=torch.float32)
    aligned = bytekernels.route(q[:1].expand(64, 7), q[:1].expand(64, 7), ragged([64])[0]).prob[:-1]
    opposed = bytekernels.route(q[:1].expand(64, 7), -q[:1].expand(64, 7), ragged([64])[0]).prob
    assert (aligned >= 0).all()
    assert aligned.max() < 1e-6
    assert (opposed <= 1).all()
    assert opposed.min() > 1 - 1e-6


def test_required_bytes_are_boundaries_and_keep_their_prob():
    cu, total = ragged([6, 0, 3])
    q, k = make(total)
    required = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0, 0], dtype=torch.bool)
    free, routing = bytekernels.route(q, k, cu), bytekernels.route(q, k, cu, required=required)
    assert torch.equal(routing.prob, free.prob)
    assert torch.equal(routing.boundary, free.boundary | required)
    assert routing.index.tolist() == by_hand(routing.boundary.tolist(), cu.tolist())[1]


def test_capacity_fixes_the_shapes_and_loses_nothing_silently():
    cu, total = ragged([4, 0, 3])
    boundary = torch.tensor([0, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    exact = bytekernels.routing_of(boundary, cu)
    h = make(total)[0]
    roomy = bytekernels.routing_of(boundary, cu, capacity=5)
    assert roomy.index.tolist() == [1, 3, 6, -1, -1]
    assert torch.equal(bytekernels.gather_chunks(h, roomy)[3:], torch.zeros(2, 4, dtype=h.dtype))
    assert roomy.check() is roomy and not roomy.overflow
    tight = bytekernels.routing_of(boundary, cu, capacity=2)
    assert tight.index.tolist() == [1, 3]
    assert tight.overflow
    with pytest.raises(RuntimeError, match="3 chunks, but capacity=2: route with a larger capacity"):
        tight.check()
    for routing in (roomy, tight):
        assert torch.equal(routing.cu_chunks, exact.cu_chunks)
        assert torch.equal(routing.chunk_of, exact.chunk_of)


def test_gathered_rows_give_their_gradient_back_once():
    cu, total = ragged([4, 0, 3])
    boundary = torch.tensor([0, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    routing = bytekernels.routing_of(boundary, cu)
    h = make(total)[0]
    rows = bytekernels.gather_chunks(h, routing)
    assert torch.equal(rows, h[[1, 3, 6]])
    de = torch.arange(12, dtype=torch.float64).view(3, 4) + 1
    with poisoned_memory():
        (grad,) = torch.autograd.grad(rows, h, de)
    assert torch.equal(grad[[1, 3, 6]], de)
    assert not grad[[0, 2, 4, 5]].any()


def test_gradcheck():
    cu, total = ragged([3, 0, 1, 4])
    q, k = make(total, width=3)
    index = torch.tensor([1, 6], dtype=torch.int32)
    for lookahead in (True, False):
        assert torch.autograd.gradcheck(
            lambda q, k, lookahead=lookahead: reference.boundary_probability(q, k, cu, lookahead), (q, k)
        )
        assert torch.autograd.gradcheck(
            lambda q, k, lookahead=lookahead: bytekernels.route(q, k, cu, lookahead=lookahead).prob, (q, k)
        )
    chunk_of = bytekernels.chunk_layout(torch.arange(total) % 5 == 1, cu)[0]
    assert torch.autograd.gradcheck(lambda h: reference.gather_chunks(h, index, chunk_of), (q,))


@pytest.mark.parametrize("lengths", [[3, 0, 1, 5], [0], []])
def test_opcheck(lengths):
    cu, total = ragged(lengths)
    q, k = make(total, dtype=torch.float32)
    boundary = torch.arange(total) % 2 == 0
    for capacity in (None, 3):
        chunk_of, index, _ = bytekernels.chunk_layout(boundary, cu, capacity=capacity)
        torch.library.opcheck(op.route_op, (q, k, cu, boundary, True, capacity))
        torch.library.opcheck(op.chunk_layout_op, (boundary, cu, capacity))
        torch.library.opcheck(op.gather_chunks_op, (q, index, chunk_of))
        torch.library.opcheck(op.gather_chunks_backward_op, (torch.randn(index.numel(), 4), index, chunk_of))
    torch.library.opcheck(op.route_backward_op, (torch.randn(total), q.detach(), k.detach(), cu, True))


def test_arguments_are_checked():
    cu, total = ragged([5])
    q, k = make(total)
    boundary = torch.ones(total, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"q and k must have one shape \[T, D\], got \[5, 4\] and \[4, 4\]"):
        bytekernels.route(q, k[:4], cu)
    with pytest.raises(TypeError, match="cu_seqlens must be int32"):
        bytekernels.route(q, k, cu.long())
    with pytest.raises(ValueError, match="end at 4"):
        bytekernels.route(q[:4], k[:4], cu)
    with pytest.raises(TypeError, match=r"boundary must be bool, got torch\.int32"):
        bytekernels.chunk_layout(boundary.int(), cu)
    with pytest.raises(ValueError, match=r"boundary must have shape \[T\]"):
        bytekernels.chunk_layout(boundary[None], cu)
    with pytest.raises(ValueError, match=r"prob must have boundary's shape \[5\], got \[3\]"):
        bytekernels.routing_of(boundary, cu, torch.ones(3))
    with pytest.raises(ValueError, match=r"q and k must have at least one column, got \[5, 0\]"):
        bytekernels.route(q[:, :0], k[:, :0], cu)
    with pytest.raises(TypeError, match=r"required must be bool, got torch\.uint8"):
        bytekernels.route(q, k, cu, required=boundary.to(torch.uint8))
    with pytest.raises(ValueError, match=r"required must have shape \[5\], a flag a byte, got \[4\]"):
        bytekernels.route(q, k, cu, required=boundary[:4])
    with pytest.raises(ValueError, match=r"capacity must be at least 0, .* got -1"):
        bytekernels.chunk_layout(boundary, cu, capacity=-1)
    with pytest.raises(ValueError, match=r"h must have shape \[5, D\], a row a byte, got \[4, 4\]"):
        bytekernels.gather_chunks(q[:4], bytekernels.routing_of(boundary, cu))
