"""Regressions of the packing ops' speed, for pytest-benchmark, as :mod:`benchmarks.test_chunking` has them."""

import functools

import pytest

from benchmarks import bench_pack, command, harness, pack_peers

SHAPE = bench_pack.Shape(T=2**22, S=512)
DEVICE = command.default_device()
(DTYPE,) = bench_pack.DTYPES.values()


@functools.cache
def _case(op: str) -> tuple[harness.Case, harness.Truth]:
    (case,) = bench_pack.cases([op], SHAPE, DTYPE, DEVICE)
    return case, harness.Truth.of(case)


@pytest.mark.parametrize("provider", ["eager", "bytekernels"])
@pytest.mark.parametrize("op", pack_peers.OPS)
def test_pack(benchmark, op, provider):
    case, truth = _case(op)
    chosen = pack_peers.providers([provider], DEVICE)[provider]
    harness.check(case, chosen, truth)
    call = harness.call_of(case, chosen, "forward", truth.cotangents)
    benchmark.group = op
    benchmark.extra_info.update(shape=case.shape, compulsory_bytes=case.work["forward"].bytes)
    benchmark(harness.synchronized(call, DEVICE))
