"""dechunk's fast implementations against the float64 reference; their bits alone, packed and run again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bytekernels
from bytekernels import dispatch
from bytekernels.testing import assert_close, gradients, poisoned_memory, ragged, ragged_lengths

NAMES = ("weight", "null", "residual", "confidence")
RAGGED = [90, 0, 1, 33, 1, 0, 0, 200, 5]


def make(fast, lengths, width, *, density=0.4, capacity=None, dtype=torch.float32, low=0.0, seed=0):
    """A routing of random boundaries on the implementation's device, and leaves chunks and :data:`NAMES`."""
    generator = torch.Generator().manual_seed(seed)
    cu, total = ragged(lengths)
    boundary = torch.rand(total, generator=generator) < density
    with dispatch.force("reference"):
        routing = bytekernels.routing_of(boundary.to(fast.device), cu.to(fast.device), capacity=capacity)
    count = routing.index.shape[0]

    def leaf(values):
        return values.to(fast.device, dtype).requires_grad_()

    def normal(*shape):
        return leaf(torch.randn(*shape, generator=generator, dtype=torch.float64))

    weight = leaf(low + (1 - low) * torch.rand(count, generator=generator, dtype=torch.float64))
    values = [normal(count, width), weight, normal(width), normal(total, width), normal(total)]
    return routing, dict(zip(("chunks", *NAMES), values, strict=True))


def run(routing, leaves, names):
    return bytekernels.dechunk(leaves["chunks"], routing, **{name: leaves[name] for name in names})


def check(fast, routing, leaves, names):
    """The output and every gradient against the reference, NaN for NaN."""
    inputs = [leaves[name] for name in ("chunks", *names)]
    with fast.force(), poisoned_memory():
        out = run(routing, leaves, names)
        found = gradients(out, inputs)
    truths = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    with dispatch.force("reference"):
        expected = run(routing, truths, names)
        wanted = gradients(expected, [truths[name] for name in ("chunks", *names)])
    dtype = leaves["chunks"].dtype
    assert out.dtype == dtype
    for what, got, want in zip(("u", "dchunks", *names), (out, *found), (expected, *wanted), strict=True):
        assert torch.equal(got.isnan(), want.isnan()), what
        assert_close(got.nan_to_num(), want.nan_to_num(), dtype=dtype, what=what)


def test_agrees_with_the_reference(fast):
    @settings(max_examples=fast.examples)
    @given(
        lengths=ragged_lengths(around=24),
        width=st.sampled_from([16, 48]),
        density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
        low=st.sampled_from([0.0, 0.5]),
        capacity=st.sampled_from([None, 0, 5, 300]),
        names=st.sets(st.sampled_from(NAMES)),
        seed=st.integers(0, 9),
    )
    def agree(lengths, width, density, low, capacity, names, seed):
        routing, leaves = make(fast, lengths, width, density=density, capacity=capacity, low=low, seed=seed)
        check(fast, routing, leaves, [name for name in NAMES if name in names])

    agree()


@pytest.mark.parametrize("names", [(), NAMES], ids=["bare", "all"])
@pytest.mark.parametrize("width", [1, 3, 17, 512, 1000])
def test_any_width(fast, width, names):
    check(fast, *make(fast, [40, 0, 9], width), names)


def test_every_dtype(fast):
    for dtype in fast.dtypes:
        for names in ((), NAMES):
            check(fast, *make(fast, RAGGED, 64, dtype=dtype), names)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_at_all(fast, lengths):
    for capacity in (None, 2):
        check(fast, *make(fast, lengths, 16, capacity=capacity), NAMES)


def test_averages_with_a_long_memory(fast):
    """Weights that forget nothing: the walk back reaches the sequence's start from every tile."""
    routing, leaves = make(fast, [70, 0, 50], 16, density=1.0)
    for value in (0.0, 1e-3, 1.0):
        with torch.no_grad():
            leaves["weight"].fill_(value)
        check(fast, routing, leaves, NAMES)


MEMORIES = {
    "none": lambda u: torch.ones_like(u),
    "short": lambda u: 0.5 + u / 2,
    "any": lambda u: u,
    "long": lambda u: u / 50,
    "endless": lambda u: torch.zeros_like(u),
    "in turn": lambda u: torch.where(torch.arange(len(u), device=u.device) // 100 % 2 == 0, u, 1e-4),
}


@pytest.mark.parametrize("memory", MEMORIES)
def test_sequences_of_many_tiles(fast, memory):
    """Tiles hold 128 chunks in native code and 16 in Triton: one less, one more, and many."""
    around, many = (16, 50) if fast.interpreted else (128, 2000)
    lengths = [around - 1, around, 0, around + 1, 2 * around + 1, many]
    routing, leaves = make(fast, lengths, 16, density=1.0)
    with torch.no_grad():
        leaves["weight"].copy_(MEMORIES[memory](torch.rand_like(leaves["weight"])))
    check(fast, routing, leaves, NAMES)
    if fast.interpreted:
        return
    inputs = list(leaves.values())
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with fast.force():
                out = run(routing, leaves, NAMES)
                runs.append([out, *gradients(out, inputs)])
    finally:
        torch.set_num_threads(threads)
    for again in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(again, runs[0], strict=True))
    start = sum(lengths[:-1])
    own = {name: leaf.detach()[start:].requires_grad_() for name, leaf in leaves.items() if name != "null"}
    own["null"] = leaves["null"]
    with dispatch.force("reference"):
        alone_routing = bytekernels.routing_of(routing.boundary[start:], ragged([many])[0].to(fast.device))
    with fast.force():
        alone = run(alone_routing, own, NAMES)
        du = torch.randn_like(out)
        parts = torch.autograd.grad(alone, [own[name] for name in ("chunks", "weight", "confidence")], du[start:])
        out = run(routing, leaves, NAMES)
        together = torch.autograd.grad(out, [leaves[name] for name in ("chunks", "weight", "confidence")], du)
    assert torch.equal(alone, out[start:])
    for part, whole in zip(parts, together, strict=True):
        assert torch.equal(part, whole[start:])


def test_strided_vectors(fast):
    routing, leaves = make(fast, RAGGED, 48)

    def spread(value):
        return torch.stack([value, torch.full_like(value, 7)], 1)[:, 0]

    def call(routing, leaves):
        out = run(routing, leaves, NAMES)
        return [out, *torch.autograd.grad(out.sum(), [leaves[name] for name in ("chunks", *NAMES)])]

    vectors = {name: spread(leaf.detach()).requires_grad_() for name, leaf in leaves.items() if leaf.dim() == 1}
    spread_routing = routing._replace(**{name: spread(getattr(routing, name)) for name in routing._fields[2:]})
    with fast.force():
        dense = call(routing, leaves)
        strided = call(spread_routing, {**leaves, **vectors})
    assert all(torch.equal(got, want) for got, want in zip(strided, dense, strict=True))


def test_chunks_longer_than_a_block_of_rows(fast):
    check(fast, *make(fast, [300, 0, 700], 16, density=0.02), NAMES)


def test_residual_and_chunks_of_two_dtypes(fast):
    if torch.bfloat16 not in fast.dtypes:
        pytest.skip("the interpreter takes float32 alone")
    routing, leaves = make(fast, RAGGED, 64, dtype=torch.bfloat16)
    residual = torch.randn(sum(RAGGED), 64, device=fast.device).requires_grad_()
    with fast.force():
        out = run(routing, {**leaves, "residual": residual}, NAMES)
        dresidual, dchunks = torch.autograd.grad(out.sum(), (residual, leaves["chunks"]))
    with dispatch.force("reference"):
        expected = run(routing, {**leaves, "residual": residual}, NAMES)
    assert out.dtype == torch.float32
    assert_close(out, expected)
    assert torch.equal(dresidual, torch.ones_like(residual))
    assert dchunks.dtype == torch.bfloat16


def test_packed_is_one_by_one_bit_for_bit(fast):
    for dtype in fast.dtypes:
        for names in (NAMES, NAMES[1:]):
            routing, leaves = make(fast, RAGGED, 48, dtype=dtype)
            cu = ragged(RAGGED)[0]
            inputs = [leaves[name] for name in ("chunks", *names)]
            with fast.force():
                out = run(routing, leaves, names)
                du = torch.randn_like(out)
                together = dict(zip(("chunks", *names), torch.autograd.grad(out, inputs, du), strict=True))
            for s, length in enumerate(RAGGED):
                rows, ones = slice(*cu[s : s + 2].tolist()), slice(*routing.cu_chunks[s : s + 2].tolist())
                places = {"chunks": ones, "weight": ones, "null": slice(None), "residual": rows, "confidence": rows}
                own = {name: leaf.detach()[places[name]].requires_grad_() for name, leaf in leaves.items()}
                with dispatch.force("reference"):
                    alone_routing = bytekernels.routing_of(routing.boundary[rows], ragged([length])[0].to(fast.device))
                with fast.force():
                    alone = run(alone_routing, own, names)
                    parts = torch.autograd.grad(alone, [own[name] for name in ("chunks", *names)], du[rows])
                assert torch.equal(alone, out[rows])
                for name, part in zip(("chunks", *names), parts, strict=True):
                    if name != "null":  # summed over sequences
                        assert torch.equal(part, together[name][places[name]]), name


def test_runs_are_equal_bit_for_bit(fast):
    routing, leaves = make(fast, [90, 0, 41], 64)
    runs = []
    for _ in range(3):
        with fast.force():
            out = run(routing, leaves, NAMES)
            runs.append([out, *gradients(out, list(leaves.values()))])
    for again in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(again, runs[0], strict=True))


@pytest.mark.parametrize("lengths", [[1_000_000], [10] * 10_000], ids=["one of a million", "ten thousand of ten"])
@pytest.mark.parametrize(
    "name", [pytest.param("native", id="native"), pytest.param("triton", id="triton", marks=pytest.mark.gpu)]
)
def test_extreme_batches(name, lengths):
    device = "cpu" if name == "native" else "cuda"
    cu, total = ragged(lengths)
    generator = torch.Generator().manual_seed(0)
    with dispatch.force("reference"):
        routing = bytekernels.routing_of((torch.rand(total, generator=generator) < 0.2).to(device), cu.to(device))
    chunks = torch.randn(routing.index.shape[0], 16, generator=generator).to(device).requires_grad_()
    with dispatch.force(name):
        held = bytekernels.dechunk(chunks, routing)
        averaged = bytekernels.dechunk(chunks, routing, weight=torch.ones(len(chunks), device=device))
    table = torch.cat([chunks, torch.zeros(1, 16, device=device)])
    assert torch.equal(held, table[routing.chunk_of.long()])
    assert torch.equal(averaged, held)
    (dchunks,) = torch.autograd.grad(held, chunks, torch.ones_like(held))
    counts = torch.bincount(routing.chunk_of[routing.chunk_of >= 0], minlength=len(chunks))
    assert torch.equal(dchunks, counts[:, None].expand(-1, 16).float())
