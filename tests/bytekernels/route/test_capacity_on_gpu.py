"""With a capacity the whole chunking round trip never waits for the device, and replays as a CUDA graph."""

import pytest
import torch

import bytekernels
from bytekernels.testing import ragged

pytestmark = pytest.mark.gpu
LENGTHS = [300, 0, 1, 700]
CAPACITY = 400


@pytest.fixture(autouse=True)
def unvalidated(monkeypatch):
    monkeypatch.setenv("BYTEKERNELS_VALIDATE", "0")  # reading offsets waits for the device


def round_trip(q, k, h, cu_seqlens):
    routing = bytekernels.route(q, k, cu_seqlens, capacity=CAPACITY)
    chunks = bytekernels.gather_chunks(h, routing)
    weight = torch.where(routing.index < 0, 1.0, routing.prob[routing.index.clamp(min=0).long()])
    return routing, bytekernels.dechunk(chunks, routing, weight=weight, residual=h)


def make(seed, share):
    """Leaves q, k, h for which about that share of bytes are boundaries."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    total = sum(LENGTHS)
    k, h = torch.randn(2, total, 64, device="cuda", generator=generator)
    turned = torch.rand(total, 1, device="cuda", generator=generator) < share
    return torch.where(turned, -1.0, 1.0) * k.roll(-1, 0), k, h


def test_no_call_waits_for_the_device():
    cu = ragged(LENGTHS)[0].cuda()
    leaves = [value.requires_grad_() for value in make(0, 0.2)]

    def gradients():
        return torch.autograd.grad(round_trip(*leaves, cu)[1].sum(), leaves)

    expected = gradients()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gradients()  # raises where something waits
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


def test_a_graph_replays_with_other_boundaries_and_reports_overflow():
    cu = ragged(LENGTHS)[0].cuda()
    held = make(0, 0.2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        round_trip(*held, cu)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing, out = round_trip(*held, cu)
        overflow = routing.overflow
    for seed, share, overflows in ((1, 0.1, False), (2, 0.3, False), (3, 0.9, True)):
        fresh = make(seed, share)
        for place, value in zip(held, fresh, strict=True):
            place.copy_(value)
        graph.replay()
        assert bool(overflow) is overflows
        expected_routing, expected = round_trip(*fresh, cu)
        assert torch.equal(routing.index, expected_routing.index)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())
        assert bool(out.isnan().any()) is overflows
