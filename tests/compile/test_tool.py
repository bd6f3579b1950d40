"""The compile check itself: what it records, reads and refuses, on kernels made for it."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GOOD, BAD = HERE / "examples" / "good.py", HERE / "examples" / "bad.py"


@pytest.fixture
def resources(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    return import_module("resources")


def test_passes_and_reports_kernels_within_budget(compile_check, tmp_path):
    report = tmp_path / "numbers" / "report.json"
    report.parent.mkdir()
    done = compile_check("--cases", GOOD, "--arch", 90, 100, "--json", report)
    assert done.returncode == 0, done.stdout
    assert [path.name for path in report.parent.iterdir()] == ["report.json"]
    written = json.loads(report.read_text())
    assert written["failures"] == []
    assert {"triton", "ptxas", "ptxas-blackwell"} == written["versions"].keys()

    row = next(row for row in written["rows"] if row["kernel"] == "good.halve_kernel")
    assert 0 < row.pop("registers") <= 255
    assert row == {
        "kernel": "good.halve_kernel",
        "dtype": "bf16",
        "arch": "sm_90",
        "spill_stores": 0,
        "spill_loads": 0,
        "stack": 0,
        "shared": 0,
        "tensor_memory": 0,
        "num_warps": 2,
        "case": "bias",
    }
    product = {(row["arch"], row["dtype"]): row for row in written["rows"] if row["kernel"] == "good.product_kernel"}
    assert product["sm_90", "bf16"]["shared"] == 2 * 128 * 128 * 2
    assert product["sm_90", "fp32"]["shared"] == 2 * 128 * 128 * 4
    assert product["sm_90", "bf16"]["tensor_memory"] == 0
    assert product["sm_100", "bf16"]["tensor_memory"] == 128  # a float32 column of 128 rows for each column of c
    table = done.stdout.splitlines()
    assert len(table) == 1 + len(written["rows"])
    assert table[1].split() == [str(written["rows"][0][name]) for name in table[0].split()]


def test_lists_each_specialisation_once(compile_check):
    done = compile_check("--cases", GOOD, "--list", "--arch", 90, "--dtype", "bf16")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == [
        "good.count_kernel bf16 sm_90 (one)",  # a constant
        "good.count_kernel bf16 sm_90 (sixteen)",  # a multiple of 16
        "good.count_kernel bf16 sm_90 (odd)",  # 17, and 19 alike
        "good.count_kernel bf16 sm_90 (large)",  # int64
        "good.halve_kernel bf16 sm_90 (bias)",  # 64 rows, and 63 alike
        "good.halve_kernel bf16 sm_90 (no bias)",
        "good.product_kernel bf16 sm_90 (product)",
    ]


def test_selects_by_room_and_by_case(compile_check):
    listed = ("--cases", GOOD, "--list", "--arch", 90, "--dtype", "fp32")
    one_room = compile_check(*listed, "--room", "product").stdout
    assert one_room == "good.product_kernel fp32 sm_90 (product)\n"
    shared = compile_check(*listed, "--case", "^odd again$").stdout
    assert shared == "good.count_kernel fp32 sm_90 (odd)\n", "a launch is listed under its first case"
    nothing = compile_check(*listed, "--case", "misspelt")
    assert nothing.returncode == 2
    assert "no launch of the cases is selected" in nothing.stdout


def test_fails_what_is_over_budget_or_does_not_compile_or_is_not_launched(compile_check, tmp_path):
    report = tmp_path / "report.json"
    done = compile_check("--cases", BAD, "--arch", 90, "--dtype", "bf16", "--json", report)
    assert done.returncode == 1, done.stdout
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    assert failures[0] == "FAILED bad.forgotten_kernel: no case launches it; add one to bad.py"
    assert failures[1].startswith("FAILED bad.crowded_kernel bf16 sm_90 (crowded): ")
    for what in ("spill stores", "spill loads", "stack"):
        assert f" bytes of {what}, at most 0" in failures[1]
    assert failures[2].startswith("FAILED bad.mistaken_kernel bf16 sm_90 (mistaken): does not compile: ")
    assert "16 and 32" in failures[2]
    assert failures[3].startswith("FAILED bad.staged_kernel bf16 sm_90 (staged): ")
    assert failures[3].endswith(" bytes of shared memory, at most 232448")
    assert len(failures) == 4

    rows = {row["kernel"]: row for row in json.loads(report.read_text())["rows"]}
    assert rows.keys() == {"bad.crowded_kernel", "bad.staged_kernel"}
    assert rows["bad.crowded_kernel"]["registers"] <= 32, "maxnreg must reach the compiler"
    assert rows["bad.crowded_kernel"]["num_warps"] == 1


def test_spills_on_sm_80_have_budgets_of_their_own(compile_check):
    done = compile_check("--cases", BAD, "--arch", 80, "--dtype", "bf16", "--case", "crowded")
    assert "FAILED bad.crowded_kernel" not in done.stdout
    assert "bad.crowded_kernel" in done.stdout


def test_refuses_to_run_under_the_interpreter(compile_check):
    done = compile_check("--cases", GOOD, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset it" in done.stdout


@pytest.mark.parametrize(
    ("arch", "more", "excess"),
    [
        (90, {}, []),
        (80, {"shared": 163 * 1024}, []),
        (80, {"shared": 163 * 1024 + 1}, ["166913 bytes of shared memory, at most 166912"]),
        (90, {"shared": 227 * 1024 + 1}, ["232449 bytes of shared memory, at most 232448"]),
        (90, {"registers": 255, "num_warps": 8}, []),
        (90, {"registers": 129, "num_warps": 16}, ["69632 registers a block, at most 65536"]),
        (100, {"tensor_memory": 513}, ["513 columns of tensor memory, at most 512"]),
        (90, {"stack": 8}, ["8 bytes of stack, at most 4"]),
        (90, {"spill_stores": 4, "spill_loads": 5}, ["5 bytes of spill loads, at most 4"]),
    ],
)
def test_limits(resources, arch, more, excess):
    modest = resources.Resources(
        registers=32, spill_stores=0, spill_loads=0, stack=0, shared=0, tensor_memory=0, num_warps=4
    )
    assert replace(modest, **more).excess(arch, local_bytes=4) == excess
