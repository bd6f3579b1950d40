"""The noise suite at the end of each stage: by tokens in stage 1, by bytes in stage 2."""

import json
import shutil

import pytest

from evals import by_stage
from training.checkpoint import COMPLETE


@pytest.fixture
def run(models, tmp_path):
    """A run's folder with a model of stage 1 and one of stage 2."""
    for stage, model in (("1.2", models.stage_1), ("2.2", models.student), ("control", models.student)):
        shutil.copytree(model, tmp_path / "run" / "stages" / stage)
        (tmp_path / "run" / "stages" / stage / COMPLETE).write_text("{}")
    (tmp_path / "text.md").write_text("The function returns a value where its argument is given.\n" * 20)
    return tmp_path / "run"


def test_each_stage_has_a_row(models, run, tmp_path, capsys):
    given = [run, "--teacher", models.teacher, "--text", tmp_path / "text.md", "--out", tmp_path / "out"]
    given += ["--", "--tasks", "continuation", "--noises", "drop", "--device", "cpu"]
    assert by_stage.main([str(word) for word in given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["| stage | drop |", "| --- | --: |"]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| 1.2", "| 2.2"]
    reports = json.loads((tmp_path / "out" / "by-stage.json").read_text())
    likelihoods = {name: report["models"]["student"]["likelihood"] for name, report in reports.items()}
    assert likelihoods == {"1.2": "along the teacher's tokens", "2.2": "lower bound, beam=1, combine=sum"}
    kept = reports["2.2"]["noise"]["drop"]["student"]["bits kept"]
    assert f"{kept[0]:.3f}" in lines[5]


def test_a_folder_without_stages_is_refused(models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        by_stage.main([str(tmp_path), "--teacher", str(models.teacher)])
    assert "has no finished stage" in capsys.readouterr().err
