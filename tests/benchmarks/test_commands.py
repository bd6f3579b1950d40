"""The commands: what they print and write, what they refuse, and that a failure is told by the exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_chunking,
    bench_linear_kl,
    bench_mamba2,
    bench_marginals,
    bench_pack,
    command,
    gpu_pass,
    harness,
    kl_peers,
    mamba_peers,
    marginal_peers,
    pack_peers,
    peers,
)
from benchmarks.bench_chunking import Shape
from benchmarks.report import PASSES
from benchmarks.shapes import parse_shape

# One worker of xdist runs them all: the dry run is made once.
pytestmark = pytest.mark.xdist_group("commands")

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "op": str,
    "pass": str,
    "provider": str,
    "shape": str,
    "dtype": str,
    "median_ms": float,
    "p20_ms": float,
    "p80_ms": float,
    "gb_per_s": float,
    "copy_fraction": float,
    "roofline_fraction": float,
    "peak_mib": (float, type(None)),
}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """One dry run of the GPU pass, which runs every benchmark with ``--quick`` on the CPU."""
    out = tmp_path_factory.mktemp("pass")
    command = [sys.executable, "benchmarks/gpu_pass.py", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, out


def test_a_dry_run_lists_the_steps_and_runs_what_a_cpu_can(dry_run):
    printed, out = dry_run
    listed, ran = printed.split("Here, of these, what a CPU can run:")
    assert "-m pytest -m gpu" in listed
    assert "--error-exitcode 1 --tool memcheck" in listed
    for path in ROOT.glob("benchmarks/bench_*.py"):
        assert f"benchmarks/{path.name} --device cuda --json" in listed
        assert f"benchmarks/{path.name} --device cpu --quick --json" in ran
        assert (out / f"{path.stem}.log").stat().st_size > 0
    summary = (out / "summary.txt").read_text()
    assert printed.rstrip().endswith(summary.rstrip())
    benches = ["chunking", "decode", "linear_kl", "mamba2", "marginals", "pack"]
    names = ["install", *(f"bench_{name}" for name in benches)]
    assert [line.split()[:2] for line in summary.splitlines()[-7:]] == [[name, "passed"] for name in names]


@pytest.mark.parametrize(
    "bench",
    [bench_chunking, bench_linear_kl, bench_mamba2, bench_marginals, bench_pack],
    ids=["chunking", "linear_kl", "mamba2", "marginals", "pack"],
)
def test_a_quick_run_writes_the_form_that_every_benchmark_shares(bench, dry_run):
    _, out = dry_run
    report = json.loads((out / f"{Path(bench.__file__).stem}.json").read_text())
    assert sorted(report) == ["machine", "refused", "rows", "skipped"]
    assert report["machine"]["kind"] == "cpu"
    assert report["refused"] == []
    for row in report["rows"]:
        assert list(row) == list(ROW)
        assert all(isinstance(row[key], kind) for key, kind in ROW.items()), row
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert {row["shape"] for row in report["rows"]} == {str(bench.QUICK_SHAPE)}
    assert (out / f"{Path(bench.__file__).stem}.png").read_bytes().startswith(b"\x89PNG")


def timed_and_skipped(path):
    report = json.loads(path.read_text())
    timed = [(row["op"], row["pass"], row["provider"]) for row in report["rows"]]
    return timed, [item["provider"] for item in report["skipped"]]


def test_what_a_quick_run_times(dry_run):
    _, out = dry_run
    timed, skipped = timed_and_skipped(out / "bench_chunking.json")
    assert timed == [(op, which, name) for op in peers.OPS for which in PASSES for name in ("eager", "bytekernels")]
    assert skipped == ["mamba-ssm"]

    timed, skipped = timed_and_skipped(out / "bench_linear_kl.json")
    names = ("eager", "bytekernels")
    assert timed == [(op, which, name) for op in kl_peers.OPS for which in ("forward", "both") for name in names]
    assert skipped == ["liger"]

    timed, skipped = timed_and_skipped(out / "bench_mamba2.json")
    assert skipped in (["mamba-ssm", "fla"], ["mamba-minimal", "mamba-ssm", "fla"])
    names = [name for name in ("eager", "mamba-minimal", "bytekernels") if name not in skipped]
    expected = [(op, which, name) for op in ("ssd", "mixer") for which in PASSES for name in names]
    assert timed == expected + [("step", "forward", name) for name in ("eager", "bytekernels")]

    timed, skipped = timed_and_skipped(out / "bench_marginals.json")
    both, first = ("eager", "bytekernels"), marginal_peers.OPS[0]
    expected = [(op, "forward", name) for op in marginal_peers.OPS for name in both]
    assert timed == [*expected[:1], (first, "forward", "reference"), *expected[1:]]
    assert skipped == []

    timed, skipped = timed_and_skipped(out / "bench_pack.json")
    names = ("numpy", "eager", "bytekernels")
    assert timed == [(op, "forward", name) for op in pack_peers.OPS for name in names]
    assert skipped == []


def test_a_refused_provider_makes_the_exit_status_1(monkeypatch, capsys, tmp_path):
    wrong = harness.Provider({"gather": lambda h, routing: dict(e=2 * h[routing.index])})
    monkeypatch.setattr(peers, "providers", lambda names, device: {"eager": wrong})
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device, budget: 1e10)
    path = tmp_path / "report.json"
    flags = ["--quick", "--device", "cpu", "--op", "gather", "--json", str(path)]
    assert bench_chunking.main(flags) == 1
    assert "refused  gather by eager: e: relative error 1.00e+00 exceeds 1e-05" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["rows"] == []
    assert report["refused"][0]["provider"] == "eager"


def test_route_and_gather_are_added_up(monkeypatch, capsys):
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device, budget: 1e10)
    flags = ["--quick", "--device", "cpu", "--op", "route", "gather", "--pass", "forward", "--provider", "eager"]
    assert bench_chunking.main(flags) == 0
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert last.split()[:3] == ["route+gather", "forward", "eager"]
    assert last.endswith("1.00x")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("bench", "rows", "dtype"),
    [
        *((bench_chunking, 2 * len(peers.OPS) * len(PASSES), dtype) for dtype in command.DTYPES),
        *((bench_mamba2, 2 * (2 * len(PASSES) + 1), dtype) for dtype in command.DTYPES),
        *((bench_linear_kl, 2 * 2 * len(kl_peers.OPS), dtype) for dtype in command.DTYPES),
        *((bench_marginals, 2 * len(marginal_peers.OPS), dtype) for dtype in command.DTYPES),
        (bench_pack, 2 * len(pack_peers.OPS), "uint8"),
    ],
)
def test_a_quick_run_on_a_gpu(bench, rows, dtype, tmp_path):
    path = tmp_path / "report.json"
    flags = ["--quick", "--device", "cuda", "--dtype", dtype, "--provider", "eager", "bytekernels", "--json", str(path)]
    assert bench.main(flags) == 0
    report = json.loads(path.read_text())
    assert report["machine"]["kind"] == "cuda"
    assert len(report["rows"]) == rows
    assert all(row["peak_mib"] >= 0 for row in report["rows"])


def test_advantages_are_printed_and_the_recurrence_runs_when_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device, budget: 1e10)
    monkeypatch.setattr(harness, "matmul_rate", lambda device, dtype, budget: 2e12)
    flags = ["--quick", "--device", "cpu", "--op", "ssd", "--pass", "forward", "--shape", "T=64,S=2"]
    assert bench_mamba2.main([*flags, "--provider", "recurrence", "bytekernels"]) == 0
    *_, first, head, _, line = capsys.readouterr().out.strip().splitlines()
    assert first == "bytekernels is faster by"
    assert head.split() == ["op", "pass", "over", "recurrence"]
    assert line.split()[:2] == ["ssd", "forward"]
    assert "recurrence" not in [name for name in mamba_peers.PROVIDERS if name not in mamba_peers.ON_REQUEST]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "T=64,X=3"], "argument --shape: 'X=3' in 'T=64,X=3': write each of T, D, C, S at most once"),
        (["--shape", "T=64,T=3"], "'T=3' in 'T=64,T=3'"),
        (["--shape", "T=0"], "'T=0' in 'T=0'"),
        (["--shape", "T=1e5"], "'T=1e5'"),
        (["--shape", "T=4,D=8,S=5"], "T=4 bytes are too few for S=5 sequences: raise T or lower S"),
        (["--device", "tpu"], "argument --device: 'tpu' is no device that benchmarks run on: use cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "use --device cpu"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--op", "rout"], "argument --op: invalid choice: 'rout'"),
        (["--provider", "flash"], "argument --provider: invalid choice: 'flash'"),
        (["--json", "report.txt"], "argument --json: 'report.txt' must be a file whose name ends in .json"),
        (["--plot", "plot.pdf"], "argument --plot: 'plot.pdf' must be a file whose name ends in .png"),
        (["--qick"], "unrecognized arguments: --qick"),
    ],
)
def test_bad_arguments_are_named_with_the_fix(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_chunking.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("H=6,G=4", "argument --shape: G=4 groups do not divide H=6 heads: change one of them"),
        ("T=2,S=3", "T=2 bytes are too few for S=3 sequences: raise T or lower S"),
        ("D=3", "'D=3' in 'D=3': write each of T, H, P, N, G, S, K at most once, as in T=512,H=4, with a whole number"),
    ],
)
def test_bad_shapes_of_mamba2_are_named_with_the_fix(shape, message, capsys):
    with pytest.raises(SystemExit):
        bench_mamba2.main(["--quick", "--device", "cpu", "--shape", shape])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_shape_of_linear_kl_has_no_sequences(capsys):
    with pytest.raises(SystemExit):
        bench_linear_kl.main(["--quick", "--device", "cpu", "--shape", "T=3"])
    assert "write each of n, V, d, e at most once, as in n=300,V=1000" in capsys.readouterr().err.splitlines()[-1]


def test_packing_has_bytes_alone_and_a_shape_with_room_for_bos(capsys):
    for flags, message in (
        (["--dtype", "float32"], "argument --dtype: invalid choice: 'float32' (choose from 'uint8')"),
        (["--shape", "T=7,S=2"], "argument --shape: T=7 bytes are too few for S=2 sequences with a BOS each"),
    ):
        with pytest.raises(SystemExit):
            bench_pack.main(["--quick", "--device", "cpu", *flags])
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_shapes_keep_the_defaults_letters():
    assert parse_shape("D=64, T=100", Shape(T=1, D=2, C=7)) == Shape(T=100, D=64, C=7, S=16)
    assert parse_shape(str(Shape(T=9, D=8, C=7, S=6)), Shape(T=1, D=1)) == Shape(T=9, D=8, C=7, S=6)


def test_the_gpu_pass_goes_on_after_a_failure(monkeypatch, capsys, tmp_path):
    left = tmp_path / "bad.json"
    left.write_text(json.dumps({"machine": {}, "rows": ["of an earlier pass"]}))
    made = [
        gpu_pass.Step("bad", [sys.executable, "-c", "print('on the way'); raise SystemExit(3)"], left),
        gpu_pass.Step("good", [sys.executable, "-c", "print('done')"]),
    ]
    monkeypatch.setattr(gpu_pass, "steps", lambda out, quick_on_cpu=False: made)
    assert gpu_pass.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "bad.log").read_text() == "on the way\n"
    assert (tmp_path / "good.log").read_text() == "done\n"
    assert not left.exists()
    results = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert results == [["install", "passed"], ["bad", "FAILED"], ["good", "passed"]]


def test_the_gpu_pass_says_what_the_install_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "bytekernels._C", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    extension, device = gpu_pass.missing(gpu=True)
    assert extension.startswith("bytekernels._C can't be imported")
    assert "`pip install -e .`" in extension
    assert "sees no CUDA device" in device
    assert gpu_pass.missing(gpu=False) == [extension]


def sanitizer_in(folder, monkeypatch, body):
    """A compute-sanitizer of that body in CUDA_HOME/bin, and none elsewhere."""
    program = folder / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CUDA_HOME", str(folder))
    return program


def test_the_gpu_pass_runs_the_kernels_in_cuda_under_a_sanitizer(monkeypatch, tmp_path):
    program = sanitizer_in(tmp_path, monkeypatch, 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"; exit 1')
    (check, *_) = [step for step in gpu_pass.steps(tmp_path) if step.name == "memcheck"]
    assert check.command[:5] == [str(program), "--error-exitcode", "1", "--tool", "memcheck"]
    rooms = {path.parent.name for path in ROOT.glob("bytekernels/*/cuda.py")}
    assert rooms and set(check.command[-len(rooms) :]) == {f"tests/bytekernels/{room}" for room in rooms}
    assert all((ROOT / folder).is_dir() for folder in check.command[-len(rooms) :])
    assert not gpu_pass.run(check, tmp_path)
    assert (tmp_path / "memcheck.log").read_text().startswith("1 --error-exitcode 1 --tool memcheck")


def test_a_step_whose_program_is_not_there_is_listed_as_not_found(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_pass.shutil, "which", lambda name, path: None)
    found = gpu_pass.steps(tmp_path)
    lacking = [step for step in found if step.lacking]
    assert [step.name for step in lacking] == ["memcheck", "racecheck"]
    monkeypatch.setattr(gpu_pass, "steps", lambda out, quick_on_cpu=False: lacking[:1])
    assert gpu_pass.main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["memcheck", "not", "found", "0"]
    assert "compute-sanitizer is not in PATH, CUDA_HOME/bin" in lacking[0].lacking


def test_the_gpu_pass_wants_a_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        gpu_pass.main(["--out", str(tmp_path / "file")])
    assert "is a file, not a folder" in capsys.readouterr().err
