"""Metrics: what each sink keeps over kills and resumes."""

import errno
import json
import math
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.conftest import LOGGED
from training import sinks
from training.errors import UserError
from training.metrics import Metrics
from training.recipe import LogRecipe

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
        log.log(1, LOGGED, 1, 1.0)
        log.log(2, LOGGED, 1, 1.0)
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
        log.log(1, LOGGED, 1, 1.0)
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


def test_metrics_drives_the_line(tmp_path, capfd):
    with metrics(tmp_path, **QUIET) as log:
        log.log(1, LOGGED, 1, 1.0)
        log.progress(0.5)
    assert capfd.readouterr().err.startswith("2.2 end to end  50%, cross_entropy 2.312  boundary 0.1  lr 2e-05")
