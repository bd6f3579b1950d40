"""Regressions of linear_kl's speed, for pytest-benchmark, as :mod:`benchmarks.test_chunking` has them."""

import functools

import pytest
import torch

from benchmarks import bench_linear_kl, command, harness, kl_peers

SHAPE = bench_linear_kl.Shape(n=1024, V=8192, d=256, e=256)
DEVICE = command.default_device()
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@functools.cache
def _case(op: str) -> tuple[harness.Case, harness.Truth]:
    (case,) = bench_linear_kl.cases([op], SHAPE, DTYPE, DEVICE)
    return case, harness.Truth.of(case)


@pytest.mark.parametrize("provider", ["eager", "bytekernels"])
@pytest.mark.parametrize("which", bench_linear_kl.work(SHAPE, DTYPE))
@pytest.mark.parametrize("op", kl_peers.OPS)
def test_linear_kl(benchmark, op, which, provider):
    case, truth = _case(op)
    chosen = kl_peers.providers([provider], DEVICE)[provider]
    harness.check(case, chosen, truth)
    call = harness.call_of(case, chosen, which, truth.cotangents)
    benchmark.group = f"{op} {which}"
    benchmark.extra_info.update(shape=case.shape, compulsory_bytes=case.work[which].bytes)
    benchmark(harness.synchronized(call, DEVICE))
