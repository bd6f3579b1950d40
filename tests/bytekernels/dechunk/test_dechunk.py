"""The specification of dechunk against a loop over chunks and bytes; straight-through confidence; capacity."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels.dechunk import op, reference
from bytekernels.testing import assert_close, gradients, poisoned_memory, ragged, ragged_lengths


def make(lengths, boundary=None, width=3, dtype=torch.float64, seed=0):
    """A routing over sequences of these lengths, and chunks, weight, null, residual and confidence for it."""
    generator = torch.Generator().manual_seed(seed)
    cu, total = ragged(lengths)
    if boundary is None:
        boundary = torch.rand(total, generator=generator) < 0.4
    routing = bytekernels.routing_of(boundary, cu)
    count = routing.index.numel()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    weight = torch.rand(count, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    options = {"weight": weight, "null": normal(width), "residual": normal(total, width), "confidence": normal(total)}
    return routing, normal(count, width), options


def by_hand(chunks, routing, weight=None, null=None, residual=None):
    z = []
    for first, last in itertools.pairwise(routing.cu_chunks.tolist()):
        for m in range(first, last):
            w = 1.0 if weight is None or m == first else weight[m]
            z.append(chunks[m] if m == first else w * chunks[m] + (1 - w) * z[m - 1])
    null = torch.zeros(chunks.shape[1], dtype=chunks.dtype) if null is None else null
    rows = [null if m < 0 else z[m] for m in routing.chunk_of.tolist()]
    u = torch.stack(rows) if rows else chunks.new_zeros(0, chunks.shape[1])
    return u if residual is None else u + residual


@settings(max_examples=40, deadline=None)
@given(lengths=ragged_lengths(), names=st.sets(st.sampled_from(["weight", "null", "residual"])), seed=st.integers(0, 9))
def test_dechunk_is_a_loop_over_chunks(lengths, names, seed):
    routing, chunks, options = make(lengths, seed=seed)
    given_ones = {name: options[name] for name in names}
    with poisoned_memory():
        out = bytekernels.dechunk(chunks, routing, **given_ones)
    expected = by_hand(chunks, routing, **given_ones)
    assert_close(out, expected)
    inputs = [chunks, *given_ones.values()]
    wanted = torch.autograd.grad(expected.sum(), inputs, allow_unused=True) if expected.requires_grad else []
    for got, want, value in zip(torch.autograd.grad(out.sum(), inputs), wanted, inputs, strict=False):
        assert_close(got, torch.zeros_like(value) if want is None else want, what="gradient")


def test_confidence_is_one_forward_and_a_gradient_backward():
    routing, chunks, options = make([6, 0, 9])
    confidence, residual = options["confidence"], options["residual"]
    plain = bytekernels.dechunk(chunks, routing, null=options["null"])
    out = bytekernels.dechunk(chunks, routing, null=options["null"], residual=residual, confidence=confidence)
    assert torch.equal(out, plain + residual)
    du = torch.randn_like(out)
    got, dresidual = torch.autograd.grad(out, (confidence, residual), du)
    torch.testing.assert_close(got, (du * plain).sum(-1))
    assert torch.equal(dresidual, du)


def test_long_averages_are_exact_for_any_weight():
    boundary = torch.ones(600, dtype=torch.bool)
    routing, chunks, _ = make([600], boundary)
    weight = torch.full((600,), 1e-3, dtype=torch.float64)
    weight[300:] = 0  # never forgets, never learns: holds z_299 to the end
    out = bytekernels.dechunk(chunks, routing, weight=weight)
    assert_close(out, by_hand(chunks, routing, weight))
    assert_close(out[-1], out[299])


def test_room_left_is_ignored_and_room_missing_is_nan():
    lengths, boundary = [4, 0, 3], torch.tensor([0, 1, 0, 1, 0, 0, 1], dtype=torch.bool)
    exact, chunks, options = make(lengths, boundary)
    cu, _ = ragged(lengths)
    out = bytekernels.dechunk(chunks, exact, **options)
    exact_gradients = gradients(out, [chunks, *options.values()])

    def padded(value, rows, fill):
        filling = torch.full((rows, *value.shape[1:]), fill, dtype=value.dtype)
        return torch.cat([value.detach(), filling]).requires_grad_()

    roomy = bytekernels.routing_of(boundary, cu, capacity=5)
    more = padded(chunks, 2, torch.nan), {**options, "weight": padded(options["weight"], 2, torch.nan)}
    with_room = bytekernels.dechunk(more[0], roomy, **more[1])
    assert torch.equal(with_room, out)
    for got, want in zip(gradients(with_room, [more[0], *more[1].values()]), exact_gradients, strict=True):
        assert torch.equal(got[: len(want)], want)
        assert not got[len(want) :].any()

    tight = bytekernels.routing_of(boundary, cu, capacity=2)
    less = bytekernels.dechunk(chunks[:2], tight, **{**options, "weight": options["weight"][:2]})
    assert torch.equal(less[:6], out[:6])
    assert less[6].isnan().all()


def test_output_dtype_follows_chunks_and_residual():
    routing, chunks, options = make([9], dtype=torch.bfloat16)
    assert bytekernels.dechunk(chunks, routing, null=options["null"].float()).dtype == torch.bfloat16
    wide = bytekernels.dechunk(chunks, routing, residual=options["residual"].float())
    assert wide.dtype == torch.float32
    assert torch.equal(wide, by_hand(chunks, routing).float() + options["residual"].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_stay_within_tolerance(dtype):
    routing, chunks, options = make([64, 0, 1, 63], width=16, dtype=dtype)
    inputs = [chunks, *options.values()]
    truth = [value.detach().double().requires_grad_() for value in inputs]
    out = bytekernels.dechunk(chunks, routing, **options)
    expected = bytekernels.dechunk(truth[0], routing, **dict(zip(options, truth[1:], strict=True)))
    assert_close(out, expected)
    names = ["chunks", *options]
    for name, got, want in zip(names, gradients(out, inputs), gradients(expected, truth), strict=True):
        assert_close(got, want, what=f"d{name}")


def test_gradcheck():
    routing, chunks, options = make([5, 0, 1, 4], torch.tensor([0, 1, 0, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool))
    weight, null, residual, _ = options.values()

    def call(chunks, weight, null, residual):
        return reference.dechunk(chunks, *routing[2:], weight, null, residual, None)

    assert torch.autograd.gradcheck(call, (chunks, weight, null, residual))
    assert torch.autograd.gradcheck(lambda c: call(c, None, None, None), (chunks,))
    assert torch.autograd.gradcheck(
        lambda c, w, n, r: bytekernels.dechunk(c, routing, weight=w, null=n, residual=r),
        (chunks, weight, null, residual),
    )


@pytest.mark.parametrize("lengths", [[7, 0, 1, 6], [0], []])
def test_opcheck(lengths):
    routing, chunks, options = make(lengths, dtype=torch.float32)
    layout = routing[2:]
    torch.library.opcheck(op.dechunk_op, (chunks, *layout, *options.values()))
    torch.library.opcheck(op.dechunk_op, (chunks, *layout, None, None, None, None))
    detached = [options[name].detach() for name in ("weight", "null", "confidence")]
    du = torch.randn(sum(lengths), 3)
    torch.library.opcheck(op.dechunk_backward_op, (du, chunks.detach(), *layout, *detached))


def test_arguments_are_checked():
    routing, chunks, options = make([8], torch.arange(8) % 2 == 0)
    with pytest.raises(ValueError, match=r"chunks must have shape \[4, D\].*got \[3, 3\]"):
        bytekernels.dechunk(chunks[:3], routing)
    for name, shape in {"weight": r"\[4\]", "null": r"\[3\]", "residual": r"\[8, 3\]", "confidence": r"\[8\]"}.items():
        with pytest.raises(ValueError, match=rf"{name} must have shape {shape}, got"):
            bytekernels.dechunk(chunks, routing, **{name: options[name][:1]})
