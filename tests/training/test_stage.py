"""The command: the whole road in miniature; mistakes in one line."""

import json
import shutil
import sys

import pytest
import torch

from models import ByteLM
from tests.training.conftest import COMMAND, TINY_RECIPE, run
from training import stage
from training.recipe import STAGES
from training.student import load_student

# One worker of xdist runs them all: what they share is made once.
pytestmark = pytest.mark.xdist_group("road")


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """The tiny recipe, all stages and the control: its folder, the flags that say what is run, and what it printed."""
    folder = tmp_path_factory.mktemp("road")
    recipe = folder / "tiny.toml"
    recipe.write_text(TINY_RECIPE.replace("\nbytes = 2048", "\nseconds = 0.2"))
    text = folder / "text.md"
    text.write_text("\n\n".join(f"Sentence number {i} is about {i % 7} things.\n" * 40 for i in range(400)))
    what = ["--recipe", recipe, "--data", text, "--cache", folder / "cache"]
    done = run(COMMAND, "--stage", "all", *what, "--out", folder / "a", "--control")
    return folder, what, done


def test_all_stages_leave_a_report_a_model_and_curves(road):
    folder, _, done = road
    out = folder / "a"
    report = json.loads((out / "report.json").read_text())
    promised = "teacher_bpb student_bpb control_bpb retention boundary_f1 stages seconds versions"
    assert set(promised.split()) <= set(report)
    assert [row["stage"] for row in report["stages"]] == [*STAGES, "control"]
    assert all(0 <= row["data_wait"] <= 1 for row in report["stages"])
    assert "draft_accuracy" not in report["stages"][-1]["after"]  # no draft head, nothing to say of it
    assert report["retention"] == pytest.approx(report["teacher_bpb"] / report["student_bpb"])
    assert 0 < report["student_bpb"] < 9
    assert 0 < report["control_bpb"] < 10  # after a second: near the 9 bits of a head that knows nothing
    assert len(report["continuations"]) == 3
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for shown in ("the teacher", "embedding alignment", "cosine", "precision", "retention", "bits/byte"):
        assert shown in done.stdout
    kept, last = (load_student(out / name) for name in ("model", "stages/2.2"))
    assert torch.equal(kept.decoder.head.weight, last.decoder.head.weight)
    assert not kept.config.token_head
    assert sorted(path.name for path in (out / "stages").iterdir()) == [*STAGES, "control"]  # no checkpoint is left


def test_each_stage_changes_its_own_part(road):
    stages = road[0] / "a" / "stages"
    models = {name: ByteLM.from_pretrained(stages / name).state_dict() for name in STAGES}
    for before, after, learns in (("1.1", "1.2", ("encoder", "core", "token_head")), ("1.2", "1.3", ("router",)),
                                  ("1.3", "2.1", ("dechunk", "decoder"))):  # fmt: skip
        changed = {n.split(".")[0] for n, v in models[before].items() if not torch.equal(v, models[after][n])}
        assert changed == set(learns)


def test_a_finished_run_is_neither_lost_nor_mixed_up(road):
    folder, what, _ = road
    out = folder / "again"
    shutil.copytree(folder / "a", out)
    again = ["--stage", "2.2", *what, "--out", out]
    done = run(COMMAND, *again, expect=2)
    assert "already holds stage 2.2: --resume to go on, --overwrite to start anew" in done.stderr
    done = run(COMMAND, *again, "--set", "seed=1", "--resume", expect=2)
    assert "was made with other numbers (seed: 0 then, 1 now)" in done.stderr
    done = run(COMMAND, *again, "--set", "seed=1", "--overwrite", expect=2)  # 1.1 to 2.1 would stay
    assert "stage 1.1" in done.stderr
    done = run(COMMAND, *again, "--from", out / "stages" / "2.2", "--overwrite", expect=2)
    assert "which --from starts from" in done.stderr
    before = (out / "report.json").read_bytes()
    done = run(COMMAND, "--stage", "all", "--out", out, "--cache", folder / "cache", "--resume")  # the kept recipe
    assert "retention" in done.stdout
    assert json.loads(before)["student_bpb"] == json.loads((out / "report.json").read_text())["student_bpb"]


def test_overwriting_a_stage_gives_up_what_was_made_from_it(road):
    folder, what, _ = road
    out = folder / "overwritten"
    shutil.copytree(folder / "a", out)
    before = (out / "stages" / "1.3" / "model.safetensors").read_bytes()
    run(COMMAND, "--stage", "2.1", *what, "--out", out, "--overwrite")
    assert sorted(path.name for path in (out / "stages").iterdir()) == ["1.1", "1.2", "1.3", "2.1"]
    assert not (out / "report.json").exists()
    assert not (out / "model").exists()
    assert (out / "stages" / "1.3" / "model.safetensors").read_bytes() == before


def test_a_stage_starts_from_another_runs_model(road):
    folder, what, _ = road
    start = ["--stage", "2.1", *what, "--from", folder / "a" / "stages" / "1.3"]
    changes = ["--set", "model.dechunk=causal", "--set", "model.draft_head=true"]
    done = run(COMMAND, *start, "--out", folder / "causal", *changes)
    model = load_student(folder / "causal" / "stages" / "2.1")
    assert model.config.dechunk == "causal" and model.config.draft_head
    assert "draft accuracy" in done.stdout
    assert torch.equal(model.router.q_proj.down.weight, load_student(folder / "a/stages/1.3").router.q_proj.down.weight)
    done = run(COMMAND, *start, "--out", folder / "wide", "--set", "model.width=32", expect=2)
    assert "has width 16, but the recipe and its teacher ask for 32" in done.stderr


def test_a_profile_says_where_the_time_of_a_step_goes(road, tmp_path):
    folder, _, _ = road
    profile = [sys.executable, "benchmarks/profile_step.py", "--steps", "1", "--json", tmp_path / "profile.json"]
    run(profile, "--run", folder / "a", "--cache", folder / "cache")
    stages = json.loads((tmp_path / "profile.json").read_text())["stages"]
    assert list(stages) == list(STAGES)
    for name, row in stages.items():
        shares = [row[group] for group in ("matrix products", "packed kernels", "attention", "all else", "optimizer")]
        assert sum(shares) == pytest.approx(1)
        assert row["matrix products"] > 0 and row["optimizer"] > 0 and row["floor"] > 0
        assert (row["attention"] > 0) == (name in ("1.2", "2.1", "2.2")), name  # the stages that run the core


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nope"], "no recipe 'nope'"),
        (["--set", "data.windw=3"], "unknown key 'data.windw'; did you mean 'window'"),
        (["--teacher", "/nowhere"], "no teacher at /nowhere"),
        (["--data", "/nowhere/*.txt"], "/nowhere/*.txt"),
        (["--budget", "soon"], "a duration is a positive number"),
        (["--stage", "2.1"], "stage 2.1 starts from stage 1.3, which has no result"),
        (["--from", "/nowhere"], "no byte-level model in /nowhere"),
        (["--control", ""], "--control compares with the whole curriculum"),
        (["--device", "tpu"], "--device tpu: use cuda or cpu"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_mistakes_take_one_line(arguments, message, road, tmp_path, capsys):
    _, what, _ = road
    defaults = {"--stage": "1.1", "--out": tmp_path / "r"} | dict(zip(what[::2], what[1::2], strict=True))
    given = defaults | dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert stage.main([str(word) for pair in given.items() for word in pair if word != ""]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stage.py: ")
    assert message in error


def test_a_corrected_mistake_does_not_lock_the_folder(road, tmp_path, capsys):
    _, what, _ = road
    arguments = [str(word) for word in ("--stage", "1.1", *what, "--out", tmp_path / "r")]
    assert stage.main([*arguments, "--teacher", "/nowhere"]) == 2
    assert stage.main(arguments) == 0
    assert "embedding alignment" in capsys.readouterr().out


def test_an_empty_text_is_one_line(road, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    _, what, _ = road
    arguments = ["--stage", "1.1", *what, "--data", empty, "--out", tmp_path / "r"]
    assert stage.main([str(word) for word in arguments]) == 2
    assert str(empty) in capsys.readouterr().err.splitlines()[-1]
