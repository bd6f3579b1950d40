"""Metrics: what each sink keeps over kills and resumes, what is shown where, what the rates are held against."""

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import meter, progress_line, sinks
from training.errors import UserError
from training.meter import READINGS, Meter, Peak, PeakMemory, peak_flops
from training.metrics import Metrics
from training.progress_line import ProgressLine, described, human
from training.recipe import LogRecipe

CPU = torch.device("cpu")
VALUES = {
    "cross_entropy": 2.31234, "boundary": 0.1, "lr": 2e-5, "grad_norm": 0.52, "bytes_per_second": 824_600.0,
    "bytes_per_second_per_device": 412_300.0, "data_wait": 0.0031, "mfu": 0.4123, "peak_memory_bytes": 12.34e9,
}  # fmt: skip
QUIET = dict(tensorboard=False)


def metrics(folder, *, step=0, is_main=True, **recipe):
    return Metrics(folder, "2.2 end to end", LogRecipe(**recipe), is_main=is_main, step=step)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_steps(folder, steps, *, step=0, loss=1.0, **recipe):
    with metrics(folder, step=step, **recipe) as log:
        for number in steps:
            log.log(number, {"loss": loss, "lr": 0.1}, 100 * number, 0.5 * number)


# ------------------------------------------------------------------------------------------------------------- JSONL


def test_jsonl_line_is_complete_on_disk_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.time, "time", lambda: 1234.56789)
    log = metrics(tmp_path / "a" / "2.2", **QUIET)
    log.log(10, {"loss": 2.5, "lr": 0.1}, 4096, 1.23456)
    written = (tmp_path / "a" / "2.2" / "metrics.jsonl").read_bytes()
    log.close()
    assert written.endswith(b"\n")
    assert json.loads(written) == {
        "step": 10, "bytes": 4096, "seconds": 1.235, "time": 1234.568, "loss": 2.5, "lr": 0.1
    }  # fmt: skip


@pytest.mark.parametrize(("resumed_at", "kept"), [(0, []), (10, [1, 10]), (15, [1, 10]), (99, [1, 10, 20, 30])])
def test_jsonl_goes_on_at_the_step_resumed_from(tmp_path, resumed_at, kept):
    log_steps(tmp_path, [1, 10, 20, 30], **QUIET)
    log_steps(tmp_path, [100], step=resumed_at, loss=7.0, **QUIET)
    assert [line["step"] for line in lines(tmp_path)] == [*kept, 100]
    assert [line["loss"] for line in lines(tmp_path)] == [1.0] * len(kept) + [7.0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # nothing half-made beside it


@pytest.mark.parametrize("half", [b'{"step": 20, "by', b'{"step": 20}', b"\x00\xff", b"[3]\n", b'{"bytes": 1}\n'])
def test_jsonl_drops_what_a_kill_left_half_written(tmp_path, half):
    log_steps(tmp_path, [1, 10], **QUIET)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(half)
    log_steps(tmp_path, [20], step=20, **QUIET)
    assert [line["step"] for line in lines(tmp_path)] == [1, 10, 20]


def test_jsonl_survives_a_kill_while_it_is_shortened(tmp_path, monkeypatch):
    log_steps(tmp_path, [1, 10, 20], **QUIET)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sinks.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            metrics(tmp_path, step=10, **QUIET)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log_steps(tmp_path, [20], step=10, **QUIET)
    assert [line["step"] for line in lines(tmp_path)] == [1, 10, 20]


def test_jsonl_says_what_was_not_finite_and_stays_json(tmp_path):
    values = {"loss": math.nan, "kl": math.inf, "bce": -math.inf, "lr": 0.1}
    with metrics(tmp_path, **QUIET) as log:
        log.log(1, values, 1, 1.0)
        log.log(2, {"loss": 1.0}, 1, 1.0)

    def no_constant(name):
        pytest.fail(f"{name} is not JSON")

    first, second = (
        json.loads(line, parse_constant=no_constant) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert (first["loss"], first["kl"], first["bce"], first["lr"]) == (None, None, None, 0.1)
    assert first["nonfinite"] == {"loss": "nan", "kl": "inf", "bce": "-inf"}
    assert second["loss"] == 1.0 and "nonfinite" not in second


# ------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_has_a_tag_for_each_value_and_one_point_for_each_step(tmp_path):
    log_steps(tmp_path, [1, 10, 20], jsonl=False)
    log_steps(tmp_path, [20, 30], step=10, loss=3.0, jsonl=False)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (10, 1.0), (20, 3.0), (30, 3.0)]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_report_draws_losses_and_leaves_readings_out(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from training import report

    with metrics(tmp_path / "logs" / "2.2") as log:
        log.log(1, VALUES, 1, 1.0)
        log.log(2, VALUES, 1, 1.0)
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append(k["label"]) or plot(self, *a, **k))
    report.write(tmp_path, {})
    assert sorted(drawn) == ["boundary", "cross_entropy"]


# -------------------------------------------------------------------------------------------------- Weights & Biases

FAKE_WANDB = """
class Error(Exception): ...
class Run:
    def __init__(self, id): self.id, self.logged, self.finished = id, [], False
    def log(self, values, step): self.logged.append((step, values))
    def finish(self): self.finished = True
calls, runs = [], []
refuse = None
def init(**arguments):
    if refuse: raise Error(refuse)
    calls.append(arguments)
    runs.append(Run(arguments["id"] or f"made-{len(runs)}"))
    return runs[-1]
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in for the package, importable as ``wandb``."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda: sys.modules["wandb"]
    sys.modules.pop("wandb", None)


def test_wandb_is_imported_only_when_asked_for(tmp_path, wandb):
    log_steps(tmp_path, [1], **QUIET)
    assert "wandb" not in sys.modules


def test_wandb_resume_goes_on_in_the_same_run(tmp_path, wandb):
    folder = tmp_path / "2.2"
    asked = dict(jsonl=False, tensorboard=False)
    with Metrics(
        folder, "title", LogRecipe(wandb="bytes", **asked), is_main=True, name="qwen 2.2", config={"seed": 3}
    ) as log:
        log.log(10, {"loss": 1.5}, 4096, 2.0)
    log_steps(folder, [20], step=10, wandb="bytes", **asked)
    log_steps(folder, [20], step=10, wandb="other", **asked)
    first, second, third = wandb().calls
    assert (first["project"], first["name"], first["config"], first["id"]) == ("bytes", "qwen 2.2", {"seed": 3}, None)
    assert first["dir"] == str(folder) and first["resume"] == "allow"
    assert second["id"] == "made-0" and second["name"] == "2.2 end to end"
    assert third["id"] is None  # a run belongs to its project
    runs = wandb().runs
    assert runs[0].logged == [(10, {"loss": 1.5, "bytes": 4096, "seconds": 2.0})]
    assert all(run.finished for run in runs)


def test_wandb_missing_is_one_line_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    for is_main in (True, False):
        with pytest.raises(UserError, match="log.wandb = 'bytes' asks for Weights & Biases.*pip install wandb"):
            metrics(tmp_path / "logs", is_main=is_main, wandb="bytes")
    assert not (tmp_path / "logs").exists()


def test_a_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="not installed"):
        sinks.check_wandb("bytes")


def test_wandb_refusal_is_one_line(tmp_path, wandb):
    import wandb as fake

    fake.refuse = "api key is missing"
    with pytest.raises(UserError, match="refuses project 'bytes' \\(api key is missing\\).*WANDB_MODE=offline"):
        metrics(tmp_path / "logs", wandb="bytes", **QUIET)


# --------------------------------------------------------------------------------------------------- ranks and disks


def test_other_ranks_write_and_say_nothing(tmp_path, capfd):
    with metrics(tmp_path / "logs", is_main=False) as log:
        log.log(1, VALUES, 1, 1.0)
        log.progress(0.5)
    assert not (tmp_path / "logs").exists()
    assert capfd.readouterr() == ("", "")


def test_a_log_that_cannot_be_written_is_dropped_with_a_warning_once(tmp_path, capfd, monkeypatch):
    log = metrics(tmp_path)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sinks.Jsonl, "write", full)
    log.log(1, {"loss": 1.0}, 1, 1.0)
    log.log(2, {"loss": 2.0}, 1, 1.0)
    log.close()
    log.close()
    said = capfd.readouterr().err
    assert said.count("without its Jsonl log, which cannot be written (No space left on device)") == 1
    assert [e.step for e in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_jsonl_on_a_full_disk(tmp_path, capfd):
    log = metrics(tmp_path, **QUIET)
    with Path("/dev/full").open("ab", buffering=0) as log.sinks[0]._file:
        log.log(1, {"loss": 1.0}, 1, 1.0)
        log.close()
    assert "(No space left on device)" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write logs to .*file/logs \(Not a directory\)"):
        metrics(tmp_path / "file" / "logs")


# --------------------------------------------------------------------------------------------------------- the meter


def test_meter_reads_the_interval_and_not_the_whole():
    clock = iter([10.0, 12.0])  # a fake clock: 10 s in which nothing was lost, then 2 s, half of them waited
    counter = Meter(CPU, 4, Peak(1e9, "made up"))
    first = counter.read(4000, next(clock), 0.0, flops=2e10)
    second = counter.read(5000, next(clock), 1.0, flops=2.4e10)
    assert set(first) == set(READINGS)
    assert (first["bytes_per_second"], first["bytes_per_second_per_device"], first["data_wait"]) == (400, 100, 0)
    assert first["mfu"] == pytest.approx(2e10 / (10 * 4 * 1e9))
    assert (second["bytes_per_second"], second["bytes_per_second_per_device"], second["data_wait"]) == (500, 125, 0.5)
    assert second["mfu"] == pytest.approx(0.4e10 / (2 * 4 * 1e9))


def test_meter_starts_from_a_checkpoints_totals():
    counter = Meter(CPU, 1, Peak(1e9, ""), num_bytes=1000, seconds=10.0, waited=2.0, flops=1e10)
    reading = counter.read(1500, 15.0, 3.0, flops=1.1e10)
    assert reading["bytes_per_second"] == 100 and reading["data_wait"] == pytest.approx(0.2)
    assert reading["mfu"] == pytest.approx(0.2)


def test_meter_without_flops_peak_or_time():
    assert "mfu" not in Meter(CPU, 1, None).read(1, 1.0, 0.0, flops=1.0)
    counter = Meter(CPU, 1, Peak(1e9, ""))
    assert "mfu" not in counter.read(1, 1.0, 0.0)
    assert set(counter.read(1, 1.0, 0.0, flops=1.0)) == {"peak_memory_bytes"}
    assert counter.read(2, 2.0, 9.0)["data_wait"] == 1.0  # a wait that began before the interval


def test_peak_memory_is_of_the_interval():
    memory = PeakMemory(CPU)
    if memory.source != "resident memory":
        pytest.skip("the system forbids resetting the high-water mark")
    quiet = memory.read()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    loud = memory.read()
    assert loud >= quiet + (48 << 20)
    assert memory.read() <= loud - (48 << 20)


def test_peak_memory_falls_back_to_the_whole_life(tmp_path, monkeypatch):
    monkeypatch.setattr(meter, "_PROC", tmp_path / "none")
    memory = PeakMemory(CPU)
    assert memory.source == "resident memory since the process began"
    assert memory.read() == memory.read() > 10 << 20


def test_peak_memory_on_cuda_is_the_allocators_and_reset_at_each_reading(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("read") or 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    memory = PeakMemory(torch.device("cuda", 0))
    assert memory.read() == 7
    assert calls == ["reset", "read", "reset"]
    assert memory.source == "allocated by torch on the device"


# ---------------------------------------------------------------------------------------------------------- the peak

PUBLISHED = {
    "NVIDIA A100-SXM4-80GB": 312, "A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989, "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989, "NVIDIA GH200 144G HBM3e": 989, "NVIDIA B200": 2250, "NVIDIA GB200": 2500,
    "NVIDIA L4": 121, "NVIDIA L40S": 362, "NVIDIA A30": 165, "NVIDIA H20": 148,
}  # fmt: skip


@pytest.mark.parametrize(("name", "tflops"), PUBLISHED.items())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_known_gpus_have_their_published_peak(monkeypatch, name, tflops, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda", 0), dtype)
    assert peak.flops == tflops * 1e12
    assert str(peak) == f"{tflops} TFLOP/s, published for {name}, {str(dtype)[6:]} dense"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16),  # a slice
        ("NVIDIA A100-SXM-64GB", torch.bfloat16),  # a chip of its own
        ("NVIDIA L40", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3", torch.float32),  # depends on TF32
    ],
)
def test_other_gpus_and_types_are_measured(monkeypatch, name, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(meter, "_measured", lambda device, dtype: Peak(1.0, f"measured {device} {dtype}"))
    assert peak_flops(torch.device("cuda", 1), dtype).source == f"measured cuda:1 {dtype}"


@pytest.fixture
def unmeasured():
    """No device has been measured yet, nor is any left measured by a fake."""
    meter._measured.cache_clear()
    yield
    meter._measured.cache_clear()


def test_measured_peak_is_the_best_product_and_is_taken_once(monkeypatch, unmeasured):
    took = iter([9.0, 0.004, 9.0, 0.02, 0.01, 0.03, 99.0])  # of each width the first counts for nothing
    monkeypatch.setattr(meter, "_product_seconds", lambda square: next(took))
    state = torch.get_rng_state()
    peaks = [peak_flops(CPU, torch.float32) for _ in range(2)]
    assert peaks[0].flops == pytest.approx(2 * 512**3 / 0.01)
    assert peaks[1] is peaks[0] and next(took) == 99.0
    assert str(peaks[0]) == "0.02684 TFLOP/s, measured: float32 matrix product, 512 wide"
    assert torch.equal(torch.get_rng_state(), state)  # training's draws are the same on every rank


@pytest.mark.parametrize(("seconds", "width"), [(1e-5, 4096), (0.02, 256)])
def test_measured_products_are_as_wide_as_the_device_is_fast(monkeypatch, unmeasured, seconds, width):
    monkeypatch.setattr(meter, "_product_seconds", lambda square: seconds)
    peak = peak_flops(CPU, torch.float32)
    assert peak.flops == pytest.approx(2 * width**3 / seconds)
    assert peak.source == f"measured: float32 matrix product, {width} wide"


def test_a_product_is_timed_from_its_start_to_its_end(monkeypatch, unmeasured):
    multiplied = []

    def slow(left, right):
        multiplied.append((left.shape, left.dtype, right.shape, right.dtype))
        time.sleep(0.02)

    monkeypatch.setattr(torch, "mm", slow)
    peak = peak_flops(CPU, torch.bfloat16)
    assert 0 < peak.flops <= 2 * 256**3 / 0.02
    assert set(multiplied) == {((256, 256), torch.bfloat16, (256, 256), torch.bfloat16)}


def test_recipe_overrides_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    peak = peak_flops(torch.device("cuda", 0), torch.bfloat16, tflops=500.0)
    assert (peak.flops, str(peak)) == (5e14, "500 TFLOP/s, as log.peak_tflops says")


def test_page_lists_the_published_peaks():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    table = page.split("| TFLOP/s | devices |")[1].split("\n\n")[0]
    rates = {int(number) for row in table.splitlines()[1:] for number in re.findall(r"\d+", row.split("|")[1])}
    assert rates == {tflops for _, tflops in meter._PUBLISHED}


# ----------------------------------------------------------------------------------------------------- what is shown


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_file_gets_plain_lines_thirty_seconds_apart_and_one_at_the_end():
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine("2.2 end to end", stream=stream, clock=clock)
    for second in range(101):  # a step and a log each second
        line.show({"loss": float(second)})
        line.move(second / 100)
        clock.now += 1
    line.close()
    line.close()
    assert stream.getvalue() == textwrap.dedent("""\
        2.2 end to end   0%, loss 0
        2.2 end to end  30%, loss 30  ETA 01:10
        2.2 end to end  60%, loss 60  ETA 00:40
        2.2 end to end  90%, loss 90  ETA 00:10
        2.2 end to end 100%, loss 100
        """)
    assert "\r" not in stream.getvalue()


def test_stage_that_logs_nothing_prints_nothing():
    stream = io.StringIO()
    line = ProgressLine("1.1", stream=stream, clock=Clock())
    line.move(0.5)
    line.close()
    assert stream.getvalue() == ""


def test_time_left_counts_from_the_step_resumed_at():
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine("1.1", stream=stream, clock=clock)
    line.move(0.5)
    clock.now += 60
    line.show({"loss": 1.0})
    line.move(0.6)  # a tenth a minute: four minutes to go
    assert stream.getvalue().endswith("ETA 04:00\n")


def on_terminal(columns, values=VALUES, title="    2.2 end to end"):
    """What a terminal of that width is sent: every state of the line, as drawn."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clock = Clock()
    with os.fdopen(theirs, "w") as stream:
        line = ProgressLine(title, stream=stream, clock=clock)
        line.move(0.25)
        clock.now += 60
        line.show(values)
        line.move(0.5)
        line._bar.refresh()
        line.show(values)
        line._bar.refresh()
        line.close()
    sent = b""
    with contextlib.suppress(OSError):  # the end of what was sent
        while piece := os.read(ours, 65536):
            sent += piece
    os.close(ours)
    return [state for state in re.split(r"[\r\n]+", sent.decode()) if state.strip()]


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 200])
def test_bar_fits_the_terminal(columns):
    states = on_terminal(columns)
    assert len(states) >= 2
    assert all(len(state.rstrip()) <= columns for state in states)


def test_bar_shows_all_that_fits_and_losses_longest():
    wide = on_terminal(200)[-1]
    assert wide.startswith("    2.2 end to end ") and "50%" in wide
    everything = "cross_entropy 2.312  boundary 0.1  lr 2e-05  norm 0.52  825 kB/s  wait 0.3%  MFU 41.2%  12.3 GB"
    assert f"{everything}  ETA 02:00" in wide
    narrow = on_terminal(80)[-1]
    assert "cross_entropy 2.312  boundary 0.1" in narrow and "GB" not in narrow


@pytest.mark.parametrize(
    ("room", "shown"),
    [
        (None, "a 1  b 2  lr 0.1  norm 3  5 kB/s  ETA 00:09"),
        (43, "a 1  b 2  lr 0.1  norm 3  5 kB/s  ETA 00:09"),
        (42, "a 1  b 2  lr 0.1  5 kB/s  ETA 00:09"),
        (30, "a 1  b 2  5 kB/s  ETA 00:09"),
        (20, "a 1  b 2  ETA 00:09"),
        (18, "a 1  b 2"),
        (5, "a 1"),
        (-4, ""),
    ],
)
def test_what_goes_first_where_there_is_no_room(room, shown):
    values = {"a": 1.0, "b": 2.0, "lr": 0.1, "grad_norm": 3.0, "bytes_per_second": 5000.0}
    assert described(values, 9.0, room) == shown


def test_every_reading_has_its_form():
    assert set(READINGS) - {"bytes_per_second_per_device"} <= set(progress_line._FORMS)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0 B/s"),
        (412.3, "412 B/s"),
        (999.7, "1 kB/s"),
        (412_300.0, "412 kB/s"),
        (3_210_000.0, "3.21 MB/s"),
        (1.5e12, "1.5 TB/s"),
        (math.nan, "nan B/s"),
    ],
)
def test_human_units(value, words):
    assert human(value, "B/s") == words


def test_metrics_drives_the_line(tmp_path, capfd):
    with metrics(tmp_path, **QUIET) as log:
        log.log(1, VALUES, 1, 1.0)
        log.progress(0.5)
    assert capfd.readouterr().err.startswith("2.2 end to end  50%, cross_entropy 2.312  boundary 0.1  lr 2e-05")
