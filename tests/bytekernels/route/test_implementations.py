"""Routing's fast implementations against the float64 reference; their bits alone, packed and run again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.testing import assert_close, gradients, poisoned_memory, ragged, ragged_lengths

RAGGED = [70, 0, 1, 33, 1, 0, 0, 32, 5]


def make(fast, lengths, width, dtype=torch.float32, seed=0):
    """cu_seqlens and leaves q, k, h on the implementation's device."""
    cu, total = ragged(lengths)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, total, width, generator=generator, dtype=torch.float64)
    return cu.to(fast.device), [value.to(fast.device, dtype).requires_grad_() for value in values]


def check(fast, lengths, width, *, lookahead=True, required=None, capacity=None, dtype=torch.float32, seed=0):
    """Everything that route and gather_chunks give, and every gradient, against the reference."""
    cu, leaves = make(fast, lengths, width, dtype, seed)
    required = None if required is None else required.to(fast.device)
    with fast.force(), poisoned_memory():
        q, k, h = leaves
        routing = bytekernels.route(q, k, cu, lookahead=lookahead, required=required, capacity=capacity)
        taken = bytekernels.gather_chunks(h, routing)
        found = gradients([routing.prob, taken], leaves)
    truths = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with dispatch.force("reference"):
        # Rounding may put a prob on the other side of one half, so the layout is that of the boundaries that came out.
        expected = bytekernels.route(truths[0], truths[1], cu, lookahead=lookahead)
        layout = bytekernels.chunk_layout(routing.boundary, cu, capacity=capacity)
        true_taken = bytekernels.gather_chunks(truths[2], routing)
    wanted = gradients([expected.prob, true_taken], truths)

    assert routing.prob.dtype == torch.float32
    assert_close(routing.prob, expected.prob, what="prob")
    chosen = routing.prob >= 0.5
    assert torch.equal(routing.boundary, chosen if required is None else chosen | required)
    for got, want in zip(routing[2:], layout, strict=True):
        assert got.dtype == torch.int32
        assert torch.equal(got, want)
    assert torch.equal(taken, true_taken.to(dtype))
    for name, got, want in zip("qkh", found, wanted, strict=True):
        assert_close(got, want, dtype=dtype, what=f"d{name}")


def test_agrees_with_the_reference(fast):
    @settings(max_examples=fast.examples)
    @given(
        lengths=ragged_lengths(around=32),
        width=st.sampled_from([16, 48]),
        lookahead=st.booleans(),
        capacity=st.sampled_from([None, 0, 7, 400]),
        require=st.booleans(),
        seed=st.integers(0, 9),
    )
    def agree(lengths, width, lookahead, capacity, require, seed):
        required = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < 0.1 if require else None
        check(fast, lengths, width, lookahead=lookahead, required=required, capacity=capacity, seed=seed)

    agree()


@pytest.mark.parametrize("width", [2, 3, 17, 512, 1000])
def test_any_width(fast, width):
    check(fast, [20, 0, 9], width)


def test_every_dtype(fast):
    for dtype in fast.dtypes:
        check(fast, RAGGED, 64, dtype=dtype)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_at_all(fast, lengths):
    check(fast, lengths, 16)
    check(fast, lengths, 16, capacity=2)


def test_blocks_of_many_rows_and_sequences(fast):
    """Sequences that span the layout's blocks of rows, and more sequences than one block of them."""
    check(fast, [1500, 0, 700], 16)
    check(fast, [3, 0, 1] * 70 + [900], 16)


def test_layout_of_long_runs_without_a_boundary(fast):
    cu, total = ragged([2500, 0, 1200, 40])
    for places in ([], [0], [2499], [1030, 3000], [3699, 3700, 3739]):
        boundary = torch.zeros(total, dtype=torch.bool)
        boundary[places] = True
        with fast.force(), poisoned_memory():
            found = bytekernels.chunk_layout(boundary.to(fast.device), cu.to(fast.device))
        with dispatch.force("reference"):
            for got, want in zip(found, bytekernels.chunk_layout(boundary, cu), strict=True):
                assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("lookahead", [True, False])
def test_packed_is_one_by_one_bit_for_bit(fast, lookahead):
    for dtype in fast.dtypes:
        cu, (q, k, h) = make(fast, RAGGED, 48, dtype)
        with fast.force():
            packed = bytekernels.route(q, k, cu, lookahead=lookahead)
            taken = bytekernels.gather_chunks(h, packed)
        dprob = torch.randn_like(packed.prob)
        with fast.force():
            together = torch.autograd.grad([packed.prob, taken], (q, k, h), [dprob, torch.ones_like(taken)])
        for s, length in enumerate(RAGGED):
            rows, ones = slice(*cu[s : s + 2].tolist()), slice(*packed.cu_chunks[s : s + 2].tolist())
            with fast.force():
                alone = bytekernels.route(q[rows], k[rows], ragged([length])[0].to(fast.device), lookahead=lookahead)
                alone_taken = bytekernels.gather_chunks(h[rows], alone)
                parts = torch.autograd.grad(
                    [alone.prob, alone_taken], (q, k, h), [dprob[rows], torch.ones_like(alone_taken)]
                )
            assert torch.equal(alone.prob, packed.prob[rows])
            assert torch.equal(alone.boundary, packed.boundary[rows])
            assert torch.equal(alone.index + cu[s], packed.index[ones])
            shifted = torch.where(alone.chunk_of < 0, -1, alone.chunk_of + packed.cu_chunks[s])
            assert torch.equal(shifted, packed.chunk_of[rows])
            assert torch.equal(alone_taken, taken[ones])
            for got, want in zip(parts, together, strict=True):
                assert torch.equal(got[rows], want[rows])


def test_runs_are_equal_bit_for_bit(fast):
    cu, leaves = make(fast, [300, 0, 41], 64)
    runs = []
    for _ in range(3):
        with fast.force():
            routing = bytekernels.route(*leaves[:2], cu)
            runs.append([*routing, *gradients(routing.prob, leaves[:2])])
    for again in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(again, runs[0], strict=True))


def test_strided_rows_are_taken_as_they_are(fast):
    """q and k as columns of one projection."""
    cu, (both, _, _) = make(fast, RAGGED, 64)
    with fast.force():
        strided = bytekernels.route(both[:, :32], both[:, 32:], cu)
        dense = bytekernels.route(both[:, :32].contiguous(), both[:, 32:].contiguous(), cu)
    assert torch.equal(strided.prob, dense.prob)


def test_strided_offsets_flags_and_layouts(fast):
    cu, (q, k, h) = make(fast, RAGGED, 16)
    required = torch.arange(len(q), device=fast.device) % 7 == 0

    def spread(value):
        return torch.stack([value, torch.zeros_like(value)], 1)[:, 0]

    with fast.force():
        dense = bytekernels.route(q, k, cu, required=required)
        strided = bytekernels.route(q, k, spread(cu), required=spread(required))
        layout = bytekernels.chunk_layout(spread(dense.boundary), spread(cu))
        taken = bytekernels.gather_chunks(
            h, strided._replace(index=spread(dense.index), chunk_of=spread(dense.chunk_of))
        )
        (dh,) = torch.autograd.grad(taken.sum(), h)
    assert all(torch.equal(got, want) for got, want in zip(strided, dense, strict=True))
    assert all(torch.equal(got, want) for got, want in zip(layout, dense[2:], strict=True))
    assert torch.equal(taken, h[dense.index.long()])
    assert torch.equal(dh, dense.boundary[:, None].expand_as(h).float())


def test_zero_rows_and_nan(fast):
    cu, (q, k, _) = make(fast, [5], 16)
    with torch.no_grad():
        q[0], k[3] = 0, torch.nan
    with fast.force():
        routing = bytekernels.route(q, k, cu)
    assert routing.prob[0] == 0.5 and routing.boundary[0]
    assert routing.prob[2].isnan() and not routing.boundary[2]


@pytest.mark.parametrize("lengths", [[1_000_000], [10] * 10_000], ids=["one of a million", "ten thousand of ten"])
@pytest.mark.parametrize(
    "fast", [pytest.param("native", id="native"), pytest.param("triton", id="triton", marks=pytest.mark.gpu)]
)
def test_extreme_batches(fast, lengths):
    device = "cpu" if fast == "native" else "cuda"
    cu, total = ragged(lengths)
    q, k = torch.randn(2, total, 16, generator=torch.Generator().manual_seed(0)).to(device)
    with dispatch.force(fast):
        routing = bytekernels.route(q, k, cu.to(device))
    with dispatch.force("reference"):
        assert_close(routing.prob, bytekernels.route(q, k, cu.to(device)).prob)
        layout = bytekernels.chunk_layout(routing.boundary, cu.to(device))
    assert all(torch.equal(got, want) for got, want in zip(routing[2:], layout, strict=True))
