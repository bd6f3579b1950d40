"""Regressions of the chunking kernels' speed, for pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Each op and pass is a group with the plain PyTorch chain beside ours. Every benchmark is first held to the float64
reference. ``--benchmark-autosave`` keeps a run under .benchmarks/, ``--benchmark-compare`` and
``--benchmark-compare-fail=median:20%`` hold the next one against it.
"""

import functools

import pytest
import torch

from benchmarks import bench_chunking, command, harness, peers
from benchmarks.report import PASSES

SHAPE = bench_chunking.Shape(T=16384, D=256)
DEVICE = command.default_device()
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@functools.cache
def _case(op: str) -> tuple[harness.Case, harness.Truth]:
    (case,) = bench_chunking.cases([op], SHAPE, DTYPE, DEVICE)
    return case, harness.Truth.of(case)


@pytest.mark.parametrize("provider", ["eager", "bytekernels"])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("op", peers.OPS)
def test_chunking(benchmark, op, which, provider):
    case, truth = _case(op)
    chosen = harness.Provider({"eager": peers.EAGER, "bytekernels": peers.OURS}[provider])
    harness.check(case, chosen, truth)
    call = harness.call_of(case, chosen, which, truth.cotangents)
    benchmark.group = f"{op} {which}"
    benchmark.extra_info.update(shape=case.shape, compulsory_bytes=case.work[which].bytes)
    benchmark(harness.synchronized(call, DEVICE))
