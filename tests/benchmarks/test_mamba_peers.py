"""The Mamba2 benchmark's truth against the specification, and its providers against the truth."""

import dataclasses
import importlib.machinery
import os
import sys
import types

import pytest
import torch

from benchmarks import harness, mamba_peers, peers, public
from benchmarks.bench_mamba2 import Shape, cases, work
from benchmarks.report import Report, advantages
from bytekernels.ragged import positions
from bytekernels.testing import assert_close
from tests.models.data.record_mamba2 import interpreted

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(T=150, H=4, P=8, N=16, G=2, S=3)  # the longest sequence has three of eager's chunks


def case_of(op, dtype=torch.float32, shape=SHAPE):
    (case,) = cases([op], shape, dtype, CPU)
    return case


@pytest.mark.parametrize("op", mamba_peers.OPS)
def test_the_truth_is_the_specifications(op):
    case = case_of(op)
    specification = dataclasses.replace(mamba_peers.OURS, settings=peers.REFERENCE.settings)
    truth = harness.Truth.of(case)
    expected = harness.Truth.of(dataclasses.replace(case, reference=specification))
    for kind in ("outputs", "gradients"):
        values, expected_values = getattr(truth, kind), getattr(expected, kind)
        assert sorted(values) == sorted(expected_values)
        for name, value in values.items():
            assert value.dtype == torch.float64
            assert_close(value, expected_values[name], what=f"{name} in {kind}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", mamba_peers.OPS)
def test_every_provider_passes_the_check(op, dtype):
    case = case_of(op, dtype)
    truth = harness.Truth.of(case)
    for name, provider in mamba_peers.providers(["recurrence", "eager", "bytekernels"], CPU).items():
        if op in provider.functions:
            harness.check(case, provider, truth)
        else:
            assert (op, name) == ("step", "recurrence")


@pytest.mark.parametrize("op", ["ssd", "mixer"])
def test_the_published_form_passes_where_it_is_installed(op):
    minimal = mamba_peers.providers(["mamba-minimal"], CPU)["mamba-minimal"]
    if isinstance(minimal, harness.Unavailable):
        pytest.skip(minimal.reason)
    case = case_of(op)
    harness.check(case, minimal, harness.Truth.of(case))


@pytest.fixture
def mamba_kernels():
    """mamba-ssm's kernels on the CPU, interpreted; on a GPU the benchmark itself checks them."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("interpreted on machines without a GPU alone")
    reason = public.missing(lambda: public.mamba_ssm("ops.triton.ssd_combined"), "mamba-ssm", "mamba-ssm")
    if reason is not None:
        pytest.skip(reason.reason)
    with interpreted():
        yield public.mamba_ssm("ops.triton.ssd_combined")


@pytest.mark.parametrize("op", mamba_peers.OPS)
def test_mamba_ssms_kernels_pass_where_they_are_installed(op, mamba_kernels, monkeypatch):
    monkeypatch.setattr(mamba_peers.importlib.util, "find_spec", lambda name: None)  # without causal-conv1d
    case = case_of(op)
    harness.check(case, mamba_peers.providers(["mamba-ssm"], CUDA)["mamba-ssm"], harness.Truth.of(case))


def test_mamba_ssm_with_causal_conv1d_where_it_is_installed(mamba_kernels, monkeypatch):
    """That package is CUDA alone: plain PyTorch stands in for its two functions."""

    def forward(x, weight, bias, seq_idx, initial_states, final_states, silu):
        assert initial_states is None and final_states is None and silu
        cu_seqlens = torch.cat([torch.zeros(1), seq_idx[0].bincount().cumsum(0)]).to(torch.int32)
        return mamba_peers.eager_conv(x[0].T, weight, bias, cu_seqlens).T[None]

    def update(x, conv_state, weight, bias, activation):
        assert activation == "silu" and conv_state.dtype == x.dtype
        return mamba_peers.eager_conv_step(x, conv_state, weight, bias)

    package = types.ModuleType("causal_conv1d")
    package.__spec__ = importlib.machinery.ModuleSpec("causal_conv1d", None)
    package.causal_conv1d_update = update
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    monkeypatch.setattr(mamba_kernels, "causal_conv1d_fwd_function", forward)
    provider = mamba_peers.providers(["mamba-ssm"], CUDA)["mamba-ssm"]

    case = case_of("mixer")
    with torch.no_grad():
        y = provider.functions["mixer"](**case.arguments)["y"]
    assert_close(y, harness.Truth.of(case).outputs["y"], dtype=torch.float32)
    case = case_of("step")
    harness.check(case, provider, harness.Truth.of(case))


def simple_gla_by_definition(q, k, v, g, *, scale, cu_seqlens):
    """Simple gated linear attention: ``S_t = exp(g_t) S_{t-1} + k_t (x) v_t``, ``o_t = scale q_t S_t``."""
    first = positions(cu_seqlens, q.shape[1]) == 0
    state, rows = q.new_zeros(*k.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        if first[t]:
            state = torch.zeros_like(state)
        state = g[0, t].exp()[:, None, None] * state + k[0, t][..., None] * v[0, t][:, None]
        rows.append(scale * (q[0, t][:, None] @ state)[:, 0])
    return torch.stack(rows)[None], None


def test_simple_gla_is_called_for_the_same_scan(monkeypatch):
    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = simple_gla_by_definition
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    case = case_of("ssd")
    harness.check(case, mamba_peers.providers(["fla"], CUDA)["fla"], harness.Truth.of(case))


def test_providers_say_why_they_cannot_run(monkeypatch):
    for name in ("mamba-ssm", "fla"):
        assert "CUDA" in mamba_peers.providers([name], CPU)[name].reason
    for module in ("mamba_ssm", "mamba_ssm.modules.ssd_minimal", "mamba_ssm.ops.triton.ssd_combined", "fla"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, install in {
        "mamba-minimal": "mamba-ssm",
        "mamba-ssm": "mamba-ssm",
        "fla": "flash-linear-attention",
    }.items():
        assert f"pip install {install}" in mamba_peers.providers([name], CUDA)[name].reason


def test_a_step_leaves_the_cases_states_alone():
    case = case_of("step")
    before = {name: case.arguments[name].clone() for name in case.updated}
    truth = harness.Truth.of(case)
    for provider in mamba_peers.providers(["eager", "bytekernels"], CPU).values():
        harness.check(case, provider, truth)
        call = harness.call_of(case, provider, "forward", {})
        first, second = call()["y"].clone(), call()["y"]
        assert not torch.equal(first, second)  # the next byte finds the states that this one left
    for name, value in before.items():
        assert torch.equal(case.arguments[name], value)


def test_the_mixers_work_is_that_of_its_parts_and_more_than_its_arguments():
    scan, mixer = (work(op, SHAPE, torch.float32) for op in ("ssd", "mixer"))
    arguments = case_of("mixer").arguments
    for which in ("forward", "backward", "both"):
        assert mixer[which].bytes > scan[which].bytes
        assert mixer[which].flops > scan[which].flops
        assert mixer[which].bytes > arguments["zxbcdt"].nbytes
    assert mixer["both"] == mixer["forward"] + mixer["backward"]


def test_a_steps_work_is_its_states_read_and_written_and_its_rows():
    case = case_of("step", torch.float32)
    sizes = {name: value.nbytes for name, value in case.arguments.items() if isinstance(value, torch.Tensor)}
    new_row, y, positions = (4 * SHAPE.S * width for width in (SHAPE.channels, SHAPE.inner, 2 * SHAPE.H))
    assert list(case.work) == ["forward"]
    assert case.work["forward"].bytes == sum(sizes.values()) + sizes["ssm"] + new_row + y + positions


def test_advantages_are_those_of_our_medians():
    rows = [
        {"op": op, "pass": "forward", "provider": name, "median_ms": time}
        for op, name, time in (
            ("ssd", "recurrence", 30.0),
            ("ssd", "eager", 5.0),
            ("ssd", "bytekernels", 2.0),
            ("step", "eager", 1.0),
            ("step", "bytekernels", 4.0),
        )
    ]
    first, head, _, *lines = advantages(Report({}, rows)).splitlines()
    assert "bytekernels is faster" in first
    assert head.split() == ["op", "pass", "over", "recurrence", "over", "eager"]
    assert [line.split() for line in lines] == [["ssd", "forward", "15.00x", "2.50x"], ["step", "forward", "0.25x"]]
    assert advantages(Report({}, rows[:2])) == ""
    assert advantages(Report({}, rows[2:3])) == ""
