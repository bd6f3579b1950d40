"""Regressions of the Mamba2 kernels' speed, for pytest-benchmark, as :mod:`benchmarks.test_chunking` has them."""

import functools

import pytest
import torch

from benchmarks import bench_mamba2, command, harness, mamba_peers

SHAPE = bench_mamba2.Shape(T=4096, H=4, P=64, N=64, S=4)
DEVICE = command.default_device()
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
PASSES = [(op, which) for op in mamba_peers.OPS for which in bench_mamba2.work(op, SHAPE, DTYPE)]


@functools.cache
def _case(op: str) -> tuple[harness.Case, harness.Truth]:
    (case,) = bench_mamba2.cases([op], SHAPE, DTYPE, DEVICE)
    return case, harness.Truth.of(case)


@pytest.mark.parametrize("provider", ["eager", "bytekernels"])
@pytest.mark.parametrize(("op", "which"), PASSES)
def test_mamba2(benchmark, op, which, provider):
    case, truth = _case(op)
    chosen = mamba_peers.providers([provider], DEVICE)[provider]
    harness.check(case, chosen, truth)
    call = harness.call_of(case, chosen, which, truth.cotangents)
    benchmark.group = f"{op} {which}"
    benchmark.extra_info.update(shape=case.shape, compulsory_bytes=case.work[which].bytes)
    benchmark(harness.synchronized(call, DEVICE))
