"""Runs side by side: the table says what was logged, and mistakes are named."""

import json

import pytest

from training import curves


@pytest.fixture
def runs(tmp_path):
    """One run of 100 seconds whose loss is 1000 / seconds, and one that ended after 50 at half of it."""
    for name, seconds, scale in (("long", 100, 1000), ("short", 50, 500)):
        folder = tmp_path / name / "logs" / "1.1"
        folder.mkdir(parents=True)
        lines = [
            json.dumps({"step": s, "seconds": float(s), "loss": scale / s, "mse": 1.0}) for s in range(1, seconds + 1)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_table_is_of_the_last_twentieth_before_each_moment(runs, capsys):
    assert curves.main([str(runs / "long"), str(runs / "short"), "--stage", "1.1", "--points", "2"]) == 0
    head, _, middle, end = capsys.readouterr().out.splitlines()
    assert head == "| seconds | long | short |"
    mean = sum(1000 / s for s in (48, 49, 50)) / 3
    assert middle == f"| 50 | {mean:.4g} | {mean / 2:.4g} |"
    assert end == f"| 100 | {sum(1000 / s for s in range(95, 101)) / 6:.4g} |  |"


def test_the_curves_are_drawn(runs):
    path = runs / "curves.png"
    assert curves.main([str(runs / "long"), "--stage", "1.1", "--metric", "mse", "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_half_lines_and_values_that_are_not_finite_are_left_out(runs, capsys):
    log = runs / "short" / "logs" / "1.1" / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 51, "seconds": 50.5, "loss": null, "nonfinite": {"loss": "nan"}}\n{"step": 52, "sec')
    assert curves.main([str(runs / "short"), "--stage", "1.1", "--points", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"| 50 | {sum(500 / s for s in (48, 49, 50)) / 3:.4g} |"


def test_runs_of_one_name_are_refused(runs, capsys):
    with pytest.raises(SystemExit):
        curves.main([str(runs / "long"), str(runs / "short" / ".." / "long"), "--stage", "1.1"])
    assert "two runs are called long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("long", ["--stage", "2.1"], "has no log of stage 2.1"),
        ("other", ["--stage", "1.1"], "has no log of stage 1.1"),
        ("long", ["--stage", "1.1", "--metric", "kl"], "has no kl; it has loss, mse, seconds, step"),
    ],
)
def test_mistakes_are_named(runs, capsys, run, options, message):
    with pytest.raises(SystemExit):
        curves.main([str(runs / run), *options])
    assert message in capsys.readouterr().err
