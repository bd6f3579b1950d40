"""The harness: statistics, turns, the gate that keeps wrong providers from being timed, memory, the report."""

import contextlib
import dataclasses

import pytest
import torch

from benchmarks import harness, machine
from benchmarks.harness import Budget, Case, Ceilings, Provider, Unavailable
from benchmarks.report import PASSES, Report, table
from bytekernels.roofline import Work

CPU = torch.device("cpu")
BRIEF = Budget(warmup=0, rounds=2, seconds=0.0)


@pytest.fixture(autouse=True)
def _known_copy(monkeypatch):
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device, budget: 1e10)


def double(x, scale):
    return dict(y=x * scale, sign=x.detach() > 0)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0] * 1.001, None


def case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator).to(dtype).requires_grad_()
    work = {"forward": Work(24, 200), "backward": Work(24, 300), "both": Work(48, 500)}
    return Case("double", "T=6,D=4", dtype, dict(x=x, scale=torch.tensor(2.0)), Provider({"double": double}), work)


def counted(function):
    calls = []

    def call(**arguments):
        calls.append(1)
        return function(**arguments)

    return Provider({"double": call}), calls


def test_percentiles_interpolate():
    assert harness.percentiles([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert harness.percentiles([7.0]) == (7.0, 7.0, 7.0)


def test_providers_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = harness.time_in_turn(calls, CPU, Budget(warmup=1, rounds=3, seconds=0.0))
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in samples.values() for value in values)


def test_time_ends_by_seconds_or_by_the_most_rounds(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(now)))  # a second passes at each look
    samples = harness.time_in_turn({"a": lambda: None}, CPU, Budget(warmup=0, rounds=2, seconds=10.0))
    assert 2 <= len(samples["a"]) <= 5
    samples = harness.time_in_turn({"a": lambda: None}, CPU, Budget(warmup=0, rounds=2, seconds=1e9, most=7))
    assert samples["a"] == [1000.0] * 7


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda x, scale: dict(y=x * scale * 1.001, sign=x > 0), "y: relative error 1.00e-03 exceeds 1e-05"),
        (lambda x, scale: dict(y=x * scale * float("nan"), sign=x > 0), "y: 24 values are not finite"),
        (lambda x, scale: dict(y=(x * scale)[:5], sign=x > 0), "y: shape [5, 4], expected [6, 4]"),
        (lambda x, scale: dict(y=x * scale, sign=x < 0), "sign: 24 of 24 values differ"),
        (lambda x, scale: dict(y=x * scale), "no output sign"),
        (lambda x, scale: dict(y=WrongGradient.apply(x, scale), sign=x > 0), "gradient of x: relative error 1.00e-03"),
        (lambda x, scale: [][0], "IndexError: list index out of range"),
    ],
)
def test_a_wrong_provider_is_refused_and_not_timed(wrong, reason):
    provider, calls = counted(wrong)
    report = harness.run([case()], {"good": Provider({"double": double}), "wrong": provider}, ["forward"], CPU, BRIEF)
    assert len(calls) == 1
    assert [row["provider"] for row in report.rows] == ["good"]
    (refused,) = report.refused
    assert (refused["op"], refused["provider"]) == ("double", "wrong")
    assert refused["reason"].startswith(reason)
    assert f"refused  double by wrong: {refused['reason']}" in table(report)


def test_what_fails_in_one_pass_alone_is_refused_there():
    def only_with_autograd(x, scale):
        if not torch.is_grad_enabled():
            raise RuntimeError("needs autograd")
        return double(x, scale)

    report = harness.run([case()], {"a": Provider({"double": only_with_autograd})}, PASSES, CPU, BRIEF)
    assert [row["pass"] for row in report.rows] == ["backward", "both"]
    assert [refused["reason"] for refused in report.refused] == ["forward: RuntimeError: needs autograd"]


def test_tolerance_is_that_of_the_dtype():
    def rounded(x, scale):
        return dict(y=(x * scale) * 1.002, sign=x > 0)

    providers = {"rounded": Provider({"double": rounded})}
    assert not harness.run([case(torch.bfloat16)], providers, ["forward"], CPU, BRIEF).refused
    assert harness.run([case(torch.float32)], providers, ["forward"], CPU, BRIEF).refused


def test_providers_without_the_op_or_the_means_are_left_out():
    providers = {
        "good": Provider({"double": double}),
        "other": Provider({"halve": double}),
        "absent": Unavailable("needs a larger machine"),
    }
    report = harness.run([case()], providers, PASSES, CPU, BRIEF)
    assert [(row["pass"], row["provider"]) for row in report.rows] == [(which, "good") for which in PASSES]
    assert report.refused == []
    assert report.skipped == [{"provider": "absent", "reason": "needs a larger machine"}]
    assert "skipped  absent: needs a larger machine" in table(report)


def bump(state):
    state.add_(1)
    return dict(y=2 * state)


def stateful(**settings):
    work = {"forward": Work(4, 32)}
    arguments = dict(state=torch.zeros(4))
    return Case("bump", "T=4", torch.float32, arguments, Provider({"bump": bump}), work, ("state",), **settings)


def test_an_op_that_updates_its_arguments_is_checked_over_its_calls_and_leaves_the_cases_alone():
    def forgetful(state):
        return dict(y=2 * (state + 1))

    named = Provider({"bump": lambda held: bump(held)}, prepare={"bump": lambda state: dict(held=state)})
    providers = {"good": Provider({"bump": bump}), "named": named, "forgetful": Provider({"bump": forgetful})}
    case = stateful(calls=3)
    assert torch.equal(harness.Truth.of(case).outputs["y"], torch.full((4,), 6.0, dtype=torch.float64))
    report = harness.run([case], providers, PASSES, CPU, BRIEF)
    assert [(row["pass"], row["provider"]) for row in report.rows] == [("forward", "good"), ("forward", "named")]
    assert [item["provider"] for item in report.refused] == ["forgetful"]
    assert not case.arguments["state"].any()
    assert not harness.run([stateful()], {"forgetful": providers["forgetful"]}, PASSES, CPU, BRIEF).refused


def test_a_chain_may_err_by_the_sum_of_its_parts():
    providers = {"off": Provider({"double": lambda x, scale: dict(y=(x * scale) * 1.000025, sign=x > 0)})}
    of_three = dataclasses.replace(case(), chain=3)
    assert not harness.run([of_three], providers, ["forward"], CPU, BRIEF).refused
    (refused,) = harness.run([case()], providers, ["forward"], CPU, BRIEF).refused
    assert refused["reason"] == "y: relative error 2.50e-05 exceeds 1e-05"


def test_too_little_memory_is_no_wrong_result():
    def greedy(x, scale):
        raise torch.OutOfMemoryError("tried to allocate 1 EiB")

    report = harness.run([case()], {"greedy": Provider({"double": greedy})}, PASSES, CPU, BRIEF)
    assert report.rows == report.refused == []
    assert report.skipped == [{"provider": "greedy", "reason": "double needs more memory than the device has"}]


def test_the_roofline_counts_arithmetic_where_it_is_asked_to(monkeypatch):
    monkeypatch.setattr(harness, "time_in_turn", lambda calls, device, budget: {"matmul": [2.0, 1.0, 9.0]})
    assert harness.matmul_rate(CPU, torch.float32, BRIEF) == pytest.approx(2 * 1024**3 / 0.002)
    monkeypatch.undo()
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device, budget: 1e10)
    monkeypatch.setattr(harness, "matmul_rate", lambda device, dtype, budget: 1e3)
    providers = {"good": Provider({"double": double})}
    report = harness.run([case()], providers, ["forward"], CPU, BRIEF, arithmetic=torch.float32)
    (row,) = report.rows
    assert row["roofline_fraction"] == pytest.approx(24 / 1e3 / (row["median_ms"] / 1e3))
    assert report.machine["matmul_tflop_per_s"] == 1e-9


def test_settings_surround_every_call():
    inside = []

    @contextlib.contextmanager
    def settings():
        inside.append(1)
        yield
        inside.pop()

    def function(x, scale):
        assert inside
        return double(x, scale)

    providers = {"a": Provider({"double": function}, settings)}
    assert not harness.run([case()], providers, PASSES, CPU, BRIEF).refused
    assert not inside


def test_passes_are_what_they_say(monkeypatch):
    x = case().arguments["x"]
    cotangents = {"y": torch.ones(6, 4, dtype=torch.float64)}
    provider, calls = counted(double)
    forward, backward, both = (harness.call_of(case(), provider, which, cotangents) for which in PASSES)
    monkeypatch.delattr(harness, "_typed")  # the cotangents are converted by now
    calls.clear()
    assert not forward()["y"].requires_grad
    assert len(calls) == 1
    for _ in range(2):
        assert torch.equal(backward()["x"], torch.full_like(x, 2.0))
    assert len(calls) == 1
    assert torch.equal(both()["x"], torch.full_like(x, 2.0))
    assert len(calls) == 2


def test_row_by_hand():
    row = harness.row(case(), "both", "eager", [2.0, 1.0, 3.0], 1.5, Ceilings(copy=1e6, flops=None))
    assert row["median_ms"] == 2.0
    assert (row["p20_ms"], row["p80_ms"]) == pytest.approx((1.4, 2.6))
    assert row["gb_per_s"] == pytest.approx(500 / 2e-3 / 1e9)
    assert row["copy_fraction"] == pytest.approx(0.25)
    assert row["roofline_fraction"] == pytest.approx(0.25)
    assert row["peak_mib"] == 1.5
    bound = harness.row(case(), "both", "eager", [2.0], None, Ceilings(copy=1e6, flops=48e3))
    assert bound["copy_fraction"] == pytest.approx(0.25)
    assert bound["roofline_fraction"] == pytest.approx(0.5)


def test_copy_bandwidth_counts_both_ways(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(harness, "time_in_turn", lambda calls, device, budget: {"copy": [10.0, 20.0, 5000.0]})
    assert harness.copy_bandwidth(CPU, BRIEF) == pytest.approx(2 * 256 * 2**20 / 0.02)


def test_machine_says_what_the_numbers_need():
    facts = machine.facts(CPU, copy=2.5e10)
    assert facts["kind"] == "cpu"
    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    assert facts["copy_gb_per_s"] == 25.0
    line = machine.line({**facts, "device": "A CPU", "commit": "0123abcd", "dirty": True, "triton": None})
    assert "A CPU" in line
    assert "copies at 25.0 GB/s\n" in line
    assert "copies at 25.0 GB/s, matrix products at 1.50 TFLOP/s" in machine.line(machine.facts(CPU, 2.5e10, 1.5e12))
    assert f"torch {torch.__version__}, triton none; commit 0123abcd with changes" in line


@pytest.mark.gpu
def test_machine_names_the_gpu_and_its_clocks():
    facts = machine.facts(torch.device("cuda"), copy=1e12)
    assert facts["device"] == torch.cuda.get_device_name()
    assert facts["clocks"]
    assert facts["device"] in machine.line(facts)


def test_table_is_aligned():
    rows = [
        harness.row(case(), "forward", name, [time], 1.0, Ceilings(1e9)) for name, time in (("eager", 30.0), ("x", 2.0))
    ]
    head, rule, first, second = table(Report({}, rows)).splitlines()
    assert len(rule) == len(head) == len(first) == len(second)
    assert "1.00x" in first
    assert "15.00x" in second
    for column in ("median ms", "speed-up", "peak MiB"):
        end = head.index(column) + len(column)
        assert all(line[end - 1] != " " and line[end : end + 1].strip() == "" for line in (first, second))
