"""The plain PyTorch chain against the specification, and how providers that can't run say so."""

import functools
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import harness, peers
from benchmarks.bench_chunking import Shape, cases
from benchmarks.report import PASSES
from bytekernels.dechunk import reference
from bytekernels.testing import assert_close, gradients, ragged, ragged_lengths

CPU = torch.device("cpu")


@given(lengths=ragged_lengths(around=peers.BLOCK), seed=st.integers(0, 99))
def test_ema_for_any_weight(lengths, seed):
    cu, count = ragged(lengths)
    generator = torch.Generator().manual_seed(seed)
    chunks = torch.randn(count, 3, generator=generator)
    weight = torch.rand(count, generator=generator)
    weight = torch.where(weight < 0.2, 0.0, torch.where(weight > 0.8, 1.0, weight))
    z = peers.ema(chunks, weight, cu)
    assert_close(z, reference.ema(chunks.double(), weight.double(), cu))


def test_ema_gradients_past_several_blocks_of_blocks():
    cu, count = ragged([300, 0, 1, 25, 400])
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randn(count, 5, generator=generator)
    weight = 0.999 * torch.rand(count, generator=generator)
    weight[cu[:-1].long()] = 1.0  # as the routing's probabilities may be at a sequence's first chunk
    inputs = [value.requires_grad_() for value in (chunks, weight)]
    truths = [value.detach().double().requires_grad_() for value in inputs]
    found = gradients(peers.ema(*inputs, cu), inputs)
    expected = gradients(reference.ema(*truths, cu), truths)
    for name, value, truth in zip(("chunks", "weight"), found, expected, strict=True):
        assert_close(value, truth, what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", peers.OPS)
def test_every_provider_passes_the_check(op, dtype):
    (case,) = cases([op], Shape(T=4096, D=64, S=6), dtype, CPU)
    truth = harness.Truth.of(case)
    for name, provider in peers.providers(["eager", "bytekernels", "reference"], CPU).items():
        harness.check(case, provider, truth)
        assert case.op in provider.functions, name


def test_the_chain_can_be_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # traced, no C++ made
    monkeypatch.setenv("CXX", sys.executable)
    compiled = peers.providers(["compile"], CPU)["compile"]
    for case in cases(peers.OPS, Shape(T=512, D=32, S=3), torch.float32, CPU):
        truth = harness.Truth.of(case)
        harness.check(case, compiled, truth)
        backward = harness.call_of(case, compiled, "backward", truth.cotangents)
        for name, first in backward().items():
            assert torch.equal(first, backward()[name])


@pytest.mark.parametrize("C", [1, 5, 40])
def test_the_batch_is_cut_as_asked(C):
    shape = Shape(T=8192, D=32, C=C, S=7)
    (case,) = cases(["route"], shape, torch.float32, CPU)
    q, k, cu = (case.arguments[name] for name in ("q", "k", "cu_seqlens"))
    routing = peers.our_route(q.detach(), k.detach(), cu)
    assert len(cu) == shape.S + 1
    assert int(cu[-1]) == shape.T
    assert (routing["prob"] - 0.5).abs().min() > 0.09
    assert len(routing["index"]) == pytest.approx(shape.T / C, rel=0.15)
    assert case.work["both"] == case.work["forward"] + case.work["backward"]


def test_the_round_trips_work_is_that_of_its_parts():
    made = {case.op: case.work for case in cases(peers.OPS, Shape(T=512, D=16, S=2), torch.float32, CPU)}
    for which in PASSES:
        parts = [made[op][which] for op in ("route", "gather", "dechunk")]
        assert made["roundtrip"][which].bytes == sum(part.bytes for part in parts)


def scan_by_definition(x, dt, A, B, C, chunk_size, *, seq_idx):
    """Mamba2's recurrence, for one group and one state: float [1, M, heads, P]."""
    state, rows = torch.zeros_like(x[0, 0]), []
    for m in range(x.shape[1]):
        if m and seq_idx[0, m] != seq_idx[0, m - 1]:
            state = torch.zeros_like(state)
        state = (dt[0, m] * A).exp()[:, None] * state + dt[0, m, :, None] * x[0, m] * B[0, m, 0, 0]
        rows.append(state * C[0, m, 0, 0])
    return torch.stack(rows)[None]


def test_mamba_ssms_scan_is_called_for_the_same_average(monkeypatch):
    module = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    module.mamba_chunk_scan_combined = scan_by_definition
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cu, count = ragged([20, 0, 1, 9])
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randn(count, 96, generator=generator).requires_grad_()
    weight = (0.5 + 0.49 * torch.rand(count, generator=generator)).requires_grad_()
    truths = [value.detach().double().requires_grad_() for value in (chunks, weight)]
    z, expected = peers.mamba_ema(chunks, weight, cu), reference.ema(*truths, cu)
    assert_close(z, expected)
    for value, truth in zip(gradients(z, [chunks, weight]), gradients(expected, truths), strict=True):
        assert_close(value, truth)
    provider = peers.providers(["mamba-ssm"], torch.device("cuda"))["mamba-ssm"]
    assert sorted(provider.functions) == ["dechunk", "roundtrip"]


def test_providers_say_why_they_cannot_run(monkeypatch):
    assert "CUDA" in peers.providers(["mamba-ssm"], CPU)["mamba-ssm"].reason
    for module in ("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install mamba-ssm" in peers.providers(["mamba-ssm"], torch.device("cuda"))["mamba-ssm"].reason
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "'no-such-compiler' is not there" in peers.providers(["compile"], CPU)["compile"].reason


def test_the_specification_is_forced_and_the_environment_restored(monkeypatch):
    import os

    for before in (None, "native"):
        monkeypatch.delenv("BYTEKERNELS_IMPL", raising=False)
        if before is not None:
            monkeypatch.setenv("BYTEKERNELS_IMPL", before)
        with peers.REFERENCE.settings():
            assert os.environ["BYTEKERNELS_IMPL"] == "reference"
        assert os.environ.get("BYTEKERNELS_IMPL") == before
