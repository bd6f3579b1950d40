"""The rooflines against numbers counted by hand, and against the tensors that a call really takes and gives."""

import pytest
import torch

import bytekernels
from bytekernels.dechunk import roofline as dechunk_roofline
from bytekernels.linear_kl import roofline as kl_roofline
from bytekernels.roofline import Work
from bytekernels.route import roofline as route_roofline
from bytekernels.testing import ragged

SHAPE = (10, 4, 3, 2, torch.float32)  # T, D, M, S
BY_HAND = {
    route_roofline.route: Work(6 * 40, 2 * 160 + 12 + (40 + 10 + 40 + 12 + 12)),
    route_roofline.route_backward: Work(12 * 40, 4 * 160 + 40 + 12),
    route_roofline.gather_chunks: Work(0, 48 + 48 + 12),
    route_roofline.gather_chunks_backward: Work(0, 48 + 160 + 12),
    dechunk_roofline.dechunk: Work(36 + 40, 48 + 16 + 160 + 160 + (12 + 40 + 12)),
    dechunk_roofline.dechunk_backward: Work(120 + 108, 160 + 48 + 16 + (12 + 40 + 12) + 48 + 12 + 16 + 40),
}


@pytest.mark.parametrize("function", BY_HAND, ids=lambda function: function.__name__)
def test_work_by_hand(function):
    assert function(*SHAPE) == BY_HAND[function]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(dtype):
    cu, total = ragged([5, 0, 17, 1, 30])
    q, k, h, residual = torch.randn(4, total, 8).to(dtype)
    routing = bytekernels.route(q, k, cu)
    chunks = bytekernels.gather_chunks(h, routing)
    weight, null, u = torch.rand(len(chunks)), torch.randn(8).to(dtype), residual
    shape = (total, 8, len(chunks), len(cu) - 1, dtype)

    def size(*tensors):
        return sum(tensor.nbytes for tensor in tensors)

    prob, _, chunk_of, index, cu_chunks = routing
    assert route_roofline.route(*shape).bytes == size(q, k, cu, *routing)
    assert route_roofline.route_backward(*shape).bytes == size(prob, q, k, cu) + size(q, k)
    assert route_roofline.gather_chunks(*shape).bytes == size(chunks, index, chunks)
    assert route_roofline.gather_chunks_backward(*shape).bytes == size(chunks, index) + size(h)
    taken = (chunks, weight, null, chunk_of, cu_chunks)
    assert dechunk_roofline.dechunk(*shape).bytes == size(*taken, residual) + size(u)
    confidence = prob
    assert dechunk_roofline.dechunk_backward(*shape).bytes == size(u, *taken) + size(chunks, weight, null, confidence)


def test_linear_kl_reads_rows_and_heads_and_writes_the_students_gradients():
    shape = (7, 11, 3, 5, torch.bfloat16)  # n, V, d, e
    inputs = 2 * (7 * 3 + 11 * 3 + 7 * 5 + 11 * 5)
    loss = Work(2 * 7 * 11 * 3 + 2 * 7 * 11 * 5, inputs + 4)
    assert kl_roofline.linear_kl(*shape) == loss
    products = 2 * (2 * 7 * 11 * 3)
    assert kl_roofline.linear_kl_with_gradients(*shape) == loss + Work(products, 2 * (7 * 3 + 11 * 3))


def test_work_adds_and_takes_the_longer_of_its_times():
    work = Work(100, 30) + Work(20, 10)
    assert work == Work(120, 40)
    assert work.seconds(10.0) == 4.0
    assert work.seconds(10.0, 60.0) == 4.0
    assert work.seconds(10.0, 20.0) == 6.0
