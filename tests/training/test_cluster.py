"""Under torchrun: two processes walk the road of one; they are killed, stopped and resumed, by as many or by others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.conftest import COMMAND, ROOT, TINY_RECIPE, documents, one_thread, run
from training.corpus import prepare
from training.meter import READINGS
from training.recipe import STAGES
from training.sinks import JSONL
from training.student import load_student

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PAIR = [*TORCHRUN, "training/stage.py"]
STEPS = 21  # of every stage; the first has more, so that there is time to kill it
FIRST_STEPS = 60
PATIENCE = 240  # seconds, on a busy machine


# One worker of xdist runs them all: what they share is made once.
pytestmark = pytest.mark.xdist_group("cluster")


@pytest.fixture(scope="module")
def what(tmp_path_factory):
    """The flags that say what is run: the tiny recipe, with a snapshot after every step.

    All of it, the teacher too, is measured in bytes: a clock would make other weights, and roundings, in every run.
    """
    folder = tmp_path_factory.mktemp("cluster")
    recipe = folder / "tiny.toml"
    longer = TINY_RECIPE.replace("\nbytes = 2048", f"\nbytes = {STEPS * 500}").replace(
        "seconds = 1.0", "bytes = 20_480"
    )
    recipe.write_text(longer)
    text = folder / "text.md"
    text.write_text("\n\n".join(f"Sentence number {i} is about {i % 7} things.\n" * 40 for i in range(400)))
    first = ["--set", f'stage."1.1".bytes={FIRST_STEPS * 500}']
    return ["--recipe", recipe, "--data", text, "--cache", folder / "cache", *first]


@pytest.fixture
def documents_on_disk(tokenizer, tmp_path):
    """A prepared corpus, by its folder."""
    prepare(documents(), tokenizer, tmp_path / "corpus")
    return tmp_path / "corpus"


@pytest.fixture(scope="module")
def alone(what, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    run(COMMAND, "--stage", "all", *what, "--out", out)
    return out


@pytest.fixture(scope="module")
def pair(what, alone, tmp_path_factory):
    """Two processes, after one has made the teacher and the corpus."""
    out = tmp_path_factory.mktemp("pair") / "run"
    done = run(PAIR, "--stage", "all", *what, "--out", out)
    assert "retention" in done.stdout
    return out


def lines(out: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (out / "logs" / stage / JSONL).read_text().splitlines()]


def weights(out: Path, stage: str = "1.1") -> dict[str, torch.Tensor]:
    return load_student(out / "stages" / stage).state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_have_the_losses_of_one(alone, pair, stage):
    """At the same global batch: two micro-batches on one process, one on each of two."""
    ours, theirs = lines(alone, stage), lines(pair, stage)
    assert len(ours) == len(theirs) >= 20
    for one, two in zip(ours, theirs, strict=True):
        assert one["bytes"] == two["bytes"]
        for name in set(one) - {"time", "seconds", *READINGS}:  # fmt: skip
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name


@pytest.mark.slow
def test_options_have_the_losses_of_one_process_too(what, alone, tmp_path):
    """Noise is drawn from a batch's own bytes, wherever it is trained on; the anchor is cut as the student is."""
    options = ['curriculum=["joint", "2.2"]', "stage.joint.lr=1e-3", f"stage.joint.bytes={STEPS * 500}"]
    for stage in ("joint", "2.2"):
        options += [f'stage."{stage}".noise_share=0.6', f'stage."{stage}".consistency_weight=0.5']
    options.append('stage."2.2".anchor_weight=0.5')
    sets = [word for option in options for word in ("--set", option)]
    for command, out in ((COMMAND, "one"), (PAIR, "two")):
        run(command, "--stage", "all", *what, *sets, "--out", tmp_path / out)
    for stage in ("joint", "2.2"):
        ours, theirs = lines(tmp_path / "one", stage), lines(tmp_path / "two", stage)
        assert len(ours) == len(theirs) >= 20
        assert {"consistency", "boundary"} <= set(ours[0]) and ("anchor" in ours[0]) == (stage == "2.2")
        for one, two in zip(ours, theirs, strict=True):
            assert one["bytes"] == two["bytes"]
            for name in set(one) - {"time", "seconds", *READINGS}:
                assert two[name] == pytest.approx(one[name], rel=5e-5, abs=2e-5), name


def test_two_processes_report_what_one_does(alone, pair):
    ours, theirs = (json.loads((out / "report.json").read_text()) for out in (alone, pair))
    assert theirs["teacher_bpb"] == pytest.approx(ours["teacher_bpb"], rel=1e-6)
    assert theirs["student_bpb"] == pytest.approx(ours["student_bpb"], rel=1e-3)
    assert theirs["scored_bytes"] == ours["scored_bytes"]
    for one, two in zip(ours["stages"], theirs["stages"], strict=True):
        assert (one["trained"], one["steps"], one["bytes"]) == (two["trained"], two["steps"], two["bytes"])


def start(command, *arguments) -> subprocess.Popen:
    """In a group of its own, so that all of its processes can be killed."""
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=ROOT, env=one_thread(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    """Until a snapshot of at least that step is whole."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        whole = [path.parent.name for path in out.glob("stages/1.1.checkpoint/step-*/complete.json")]
        if any(int(name[5:]) >= step for name in whole):
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.01)
    raise AssertionError(f"no snapshot of step {step} within {PATIENCE} s")


def stop(process: subprocess.Popen) -> str:
    """Tell a job's workers to stop, as a cluster does; what it printed before it ended well."""
    for worker in workers_of(process.pid):
        os.kill(worker, signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output[-4000:]
    assert "told to stop after step" in output
    return output


def kill(process: subprocess.Popen) -> None:
    """All of a job's processes at once, as a machine that loses its power."""
    for one in (*workers_of(process.pid), process.pid):
        os.kill(one, signal.SIGKILL)
    process.communicate()


def workers_of(launcher: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_the_job_ends_with_the_same_bits(what, pair, tmp_path):
    restarting = [*TORCHRUN, "--max-restarts", "1", "training/stage.py"]
    process = start(restarting, "--stage", "1.1", *what, "--out", tmp_path / "run")
    wait_for_step(tmp_path / "run", 3, process)
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output[-4000:]
    assert_same_bits(tmp_path / "run", pair)


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_job(what, tmp_path):
    process = start(PAIR, "--stage", "1.1", *what, "--out", tmp_path / "run")
    wait_for_step(tmp_path / "run", 3, process)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert not (tmp_path / "run" / "stages" / "1.1").exists()


def test_a_killed_job_resumes_with_the_same_bits(what, pair, tmp_path):
    arguments = ["--stage", "1.1", *what, "--out", tmp_path / "run"]
    process = start(PAIR, *arguments)
    wait_for_step(tmp_path / "run", 5, process)
    kill(process)
    run(PAIR, *arguments, "--resume")
    assert_same_bits(tmp_path / "run", pair)


def assert_same_bits(out: Path, other: Path) -> None:
    theirs = weights(other)
    for name, value in weights(out).items():
        assert torch.equal(value, theirs[name]), name
    assert [line["step"] for line in lines(out, "1.1")] == [line["step"] for line in lines(other, "1.1")]


def test_two_processes_then_one_then_two(what, pair, tmp_path):
    """Each of the first two is told to stop, leaves a checkpoint and ends well; the others go on from it."""
    arguments = ["--stage", "1.1", *what, "--out", tmp_path / "run"]
    process = start(PAIR, *arguments)
    wait_for_step(tmp_path / "run", 3, process)
    stop(process)

    process = start(COMMAND, *arguments, "--resume")
    before = max(int(path.name[5:]) for path in (tmp_path / "run/stages/1.1.checkpoint").glob("step-*"))
    wait_for_step(tmp_path / "run", before + 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output[-4000:]
    assert "--resume goes on from there" in output

    run(PAIR, *arguments, "--resume")
    theirs = weights(pair)
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, theirs[name], atol=2e-5, rtol=1e-3, msg=name)
    for one, two in zip(lines(pair, "1.1"), lines(tmp_path / "run", "1.1"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_in_bf16_repeated_and_with_activations_computed_again(what, alone, tmp_path):
    """A copy of the model on each process, blocks in bf16: the losses of float32, within bf16's rounding."""
    arguments = ["--stage", "1.2", *what, "--out", tmp_path / "run", "--from", alone / "stages" / "1.1"]
    settings = ["precision=bf16", "parallel.shard=1", "parallel.checkpoint_activations=true"]
    run(PAIR, *arguments, *(word for setting in settings for word in ("--set", setting)))
    ours, theirs = lines(alone, "1.2"), lines(tmp_path / "run", "1.2")
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=0.05)
    assert theirs[0]["loss"] != ours[0]["loss"]


@pytest.mark.slow
def test_two_copies_of_a_model_cut_in_two(what, alone, tmp_path):
    """Four processes, replicate x shard, two micro-batches each, killed and resumed: they learn what one does."""
    four = [word if word != "2" else "4" for word in PAIR]
    arguments = ["--stage", "1.1", *what, "--out", tmp_path / "run", "--set", "parallel.shard=2"]
    arguments += ["--set", "data.batch_bytes=64"]
    process = start(four, *arguments)
    wait_for_step(tmp_path / "run", 3, process)
    kill(process)
    run(four, *arguments, "--resume")
    ours = lines(alone, "1.1")
    theirs = lines(tmp_path / "run", "1.1")
    assert theirs[0]["bytes_per_second"] == pytest.approx(4 * theirs[0]["bytes_per_second_per_device"])
    assert theirs[-1]["loss"] == pytest.approx(ours[-1]["loss"], rel=0.3)  # batches of another make-up


def test_what_is_not_finite_on_one_process_moves_no_weight_on_any(documents_on_disk, tmp_path):
    run([*TORCHRUN, "tests/training/one_bad_rank.py"], documents_on_disk, tmp_path)
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert one["skipped"] == 1
    assert one["steps"] > 3
    assert 0 < one["weights"] < float("inf")


@pytest.mark.slow
def test_text_that_is_streamed(what, tmp_path):
    """Two processes that are told to stop go on where the stream was, and read what one does."""
    records = [json.dumps({"text": f"Sentence number {i} is about {i % 7} things.\n" * 20}) for i in range(800)]
    for part in range(4):
        (tmp_path / f"{part}.jsonl").write_text("\n".join(records[part::4]))
    streamed = [tmp_path / "*.jsonl" if word == what[3] else word for word in what]
    streamed += ["--set", "data.stream=true", "--set", "data.streams=4", "--set", "data.workers=1"]
    run(COMMAND, "--stage", "1.1", *streamed, "--out", tmp_path / "one")
    arguments = ["--stage", "1.1", *streamed, "--out", tmp_path / "two"]
    process = start(PAIR, *arguments)
    wait_for_step(tmp_path / "two", 3, process)
    stop(process)
    run(PAIR, *arguments, "--resume")
    ours, theirs = lines(tmp_path / "one", "1.1"), lines(tmp_path / "two", "1.1")
    assert [line["bytes"] for line in theirs] == [line["bytes"] for line in ours]
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-5)
