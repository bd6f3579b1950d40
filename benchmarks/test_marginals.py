"""Regressions of byte marginals' and longest suffixes' speed, for pytest-benchmark, as
:mod:`benchmarks.test_chunking` has them."""

import functools

import pytest
import torch

from benchmarks import bench_marginals, command, harness, marginal_peers

SHAPE = bench_marginals.Shape(V=8192, M=64, T=16384, S=16)
DEVICE = command.default_device()
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@functools.cache
def _case(op: str) -> tuple[harness.Case, harness.Truth]:
    (case,) = bench_marginals.cases([op], SHAPE, DTYPE, DEVICE)
    return case, harness.Truth.of(case)


@pytest.mark.parametrize("provider", ["eager", "bytekernels"])
@pytest.mark.parametrize("op", marginal_peers.OPS)
def test_marginals(benchmark, op, provider):
    case, truth = _case(op)
    chosen = marginal_peers.providers([provider], DEVICE)[provider]
    harness.check(case, chosen, truth)
    call = harness.call_of(case, chosen, "forward", truth.cotangents)
    benchmark.group = op
    benchmark.extra_info.update(shape=case.shape, compulsory_bytes=case.work["forward"].bytes)
    benchmark(harness.synchronized(call, DEVICE))
