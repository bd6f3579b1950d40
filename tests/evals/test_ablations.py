"""The ablation table: rows that the recipe reader takes, commands in order, figures that are the reports'."""

import json
import statistics
import tomllib
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

from evals import ablations
from evals.ablations import BASE, NOISES, Job, Row, in_order, main, page, read_rows, results, write_text
from training.errors import UserError
from training.recipe import read_recipe
from training.stage_recipe import STAGES
from training.text import Document, is_held_out


@pytest.mark.parametrize("name", read_rows())
def test_every_row_is_a_recipe_and_a_change(name):
    row = read_rows()[name]
    recipe, base = read_recipe("ablation", row.set), read_recipe("ablation")
    changed = recipe != base or row.stage_1 != "prose" or row.stage_2 != "prose"
    assert changed == (name != BASE)
    assert row.start is None or row.start in STAGES[:3]
    assert row.teacher in (BASE, name)
    assert {row.stage_1, row.stage_2} <= {"prose", "code"}
    assert set(row.measures) <= {"noise", "boundaries", "next_word"}


def options_of(command: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for flag, value in pairwise(command):
        if flag.startswith("--"):
            found.setdefault(flag, []).append(value)
    return found


def finish(job: Job, **figures) -> None:
    job.report.parent.mkdir(parents=True, exist_ok=True)
    report = dict.fromkeys(("student_bpb", "retention", "boundary_f1", "teacher_bpb", "teacher_forced_leaking_bits"))
    job.report.write_text(json.dumps({**report, "teacher_folder": "/teacher", "stages": [], **figures}))


def test_the_base_makes_the_teacher_that_others_are_given(tmp_path):
    rows = read_rows()
    (first,) = Job(rows[BASE], 0, tmp_path).commands()
    assert "--teacher" not in options_of(first)
    (second,) = Job(rows[BASE], 1, tmp_path).commands()
    assert options_of(second)["--teacher"] == ["TEACHER-OF-base"]
    finish(Job(rows[BASE], 0, tmp_path))
    (second,) = Job(rows[BASE], 1, tmp_path).commands()
    assert options_of(second)["--teacher"] == ["/teacher"]
    assert "seed=1" in options_of(second)["--set"]
    (other,) = Job(rows["qwen3"], 0, tmp_path).commands()
    assert "--teacher" not in options_of(other)


def test_a_row_goes_on_from_the_bases_stage(tmp_path):
    (command,) = Job(Row("", set=("a=1",), start="1.2", name="x"), 2, tmp_path).commands()
    found = options_of(command)
    assert found["--from"] == [str(tmp_path / "base" / "2" / "stages" / "1.2")]
    assert found["--set"] == ["seed=2", "a=1", 'curriculum=["1.3", "2.1", "2.2"]']


def test_halves_on_other_text_are_two_runs(tmp_path):
    job = Job(Row("", stage_1="code", name="x"), 0, tmp_path)
    first, second = map(options_of, job.commands())
    assert (first["--data"], second["--data"]) == ([str(tmp_path / "code.jsonl")], [str(tmp_path / "prose.jsonl")])
    assert second["--from"] == [str(tmp_path / "x" / "0" / "stage-1" / "stages" / "1.3")]
    assert job.report == tmp_path / "x" / "0" / "stage-2" / "report.json"


def test_what_others_need_comes_first(tmp_path):
    rows = read_rows()
    names = ("forward-kl", "qwen3", BASE)
    jobs = [Job(rows[name], seed, tmp_path) for seed in (0, 1) for name in names]
    found = [[(job.row.name, job.seed) for job in phase] for phase in in_order(jobs)]
    assert found == [[(BASE, 0), ("qwen3", 0)], [(BASE, 1)], [("forward-kl", 0), ("forward-kl", 1), ("qwen3", 1)]]
    jobs = [Job(rows[name], 0, tmp_path) for name in ("prose-code", "code-prose", "code-code", BASE)]
    first, _, rest = in_order(jobs)  # one prepares the code before others read it from the cache
    assert [job.row.name for job in first] == [BASE, "code-prose"]
    assert {job.row.name for job in rest} == {"prose-code", "code-code"}


def test_rows_run_once_and_failures_are_told(tmp_path, monkeypatch, capsys):
    ran = []

    def run(command, **_):
        if command[0] == "git":
            raise OSError("the report's versions do without")
        out = options_of(command)["--out"][0]
        ran.append(out)
        if "causal" in out:
            return SimpleNamespace(returncode=2, stderr="one\nstage.py: no room", stdout="")
        name, seed = out.split("/")[-2:]
        finish(Job(Row("", name=name), int(seed), tmp_path), student_bpb=2.0)
        return SimpleNamespace(returncode=0, stderr="", stdout="done")

    monkeypatch.setattr(ablations, "write_text", lambda folder: None)
    monkeypatch.setattr(ablations.subprocess, "run", run)
    monkeypatch.setattr(ablations, "read_rows", lambda: {
        name: Row(name, start=start, name=name) for name, start in ((BASE, None), ("causal", "1.3"), ("kl", "1.1"))
    })  # fmt: skip
    given = ["--out", str(tmp_path), "--seeds", "0", "--table", str(tmp_path / "table")]
    assert main(["kl", *given]) == 1
    assert "kl, seed 0: it starts from base, seed 0, which has not been run" in capsys.readouterr().err
    assert main(given) == 1
    assert "causal, seed 0: stage.py: no room" in capsys.readouterr().err
    assert len(ran) == 3
    assert main([BASE, "kl", *given]) == 0
    assert len(ran) == 3
    assert set(json.loads((tmp_path / "table.json").read_text())["rows"]) == {BASE, "kl"}


def test_the_table_is_made_of_the_reports(tmp_path):
    rows = [
        Row("the base", name=BASE, measures=("noise", "boundaries")),
        Row("x", name="x"),
        Row("not run", name="y"),
        Row("draft", name="draft", measures=("next_word",)),
    ]
    bits = {BASE: (2.0, 2.1, 2.2), "x": (2.5, 2.4, 2.6), "draft": (2.0, 2.0, 2.3)}
    for row in rows:
        for seed, value in enumerate(bits.get(row.name, ())):
            job = Job(row, seed, tmp_path)
            finish(
                job,
                student_bpb=value,
                retention=1.9 / value,
                teacher_bpb=1.9,
                stages=[{"stage": "1.1", "after": {"mse": 0.1}}],
            )
            for path, _ in job.measures():
                path.parent.mkdir(exist_ok=True)
                measured = {
                    "noise.json": {"noise": {n: {"student": {"bits kept": [0.5, 0.1]}} for n in NOISES}},
                    "boundaries.json": {"by distance": {n: {"all": {"f1": 0.75}} for n in ("clean", *NOISES)}},
                    "next-word.json": {"next words": {"joint": [0.4, 0.1], "multibyte": [0.3, 0.1]}},
                }[path.name]
                path.write_text(json.dumps(measured))
    found = results(rows, tmp_path)
    assert set(found) == {BASE, "x", "draft"}
    assert found["x"]["1"] == {"student_bpb": 2.4, "retention": 1.9 / 2.4, "teacher_bpb": 1.9, "1.1 mse": 0.1}
    text = page(rows, found)
    sd = statistics.stdev([0.5, 0.3, 0.4])
    assert f"| `x`: x | prose | 3 |  | 2.500 ± 0.100 | 0.400 ± {sd:.3f} |" in text
    assert "| `base` | 0.500 ± 0.000 |" in text
    assert "| `base` | 0.750 ± 0.000 |" in text
    assert "| `draft` | 0.400 ± 0.000 | 0.300 ± 0.000 |" in text
    assert "`y`" not in text


def test_bits_of_code_are_not_compared_with_bits_of_prose(tmp_path):
    rows = [Row("the base", name=BASE), Row("code", name="code", stage_2="code")]
    for row, value in zip(rows, (2.0, 1.5), strict=True):
        finish(Job(row, 0, tmp_path), student_bpb=value)
    assert "| `code`: code | code | 1 |  | 1.500 |  |" in page(rows, results(rows, tmp_path))


def test_a_row_that_has_changed_is_refused(tmp_path):
    job = Job(Row("a title", set=("a=1",), name="x"), 0, tmp_path)
    job.claim()
    Job(replace(job.row, title="another"), 0, tmp_path).claim()
    with pytest.raises(UserError, match="x/0 was run with other settings: remove it, or give another --out"):
        Job(replace(job.row, set=("a=2",)), 0, tmp_path).claim()


def test_a_row_without_its_measures_is_not_finished(tmp_path):
    row = Row("", name=BASE, measures=("noise",))
    finish(Job(row, 0, tmp_path), student_bpb=2.0)
    assert results([row], tmp_path) == {}


def test_the_text_is_written_once_and_held_out_by_its_names(tmp_path, monkeypatch):
    prose = [Document(f"d{i}", f"Text number {i}.\n".encode()) for i in range(400)]
    monkeypatch.setattr(ablations, "python_docs", lambda limit_bytes: iter(prose))
    monkeypatch.setattr(ablations, "CODE_BYTES", 20_000)
    write_text(tmp_path)
    lines = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("prose", "code", "held-out")}
    assert [json.loads(line)["text"] for line in lines["prose"]] == [each.text.decode() for each in prose]
    documents = list(ablations.read_documents([str(tmp_path / "prose.jsonl")]))
    held_out = [each.text.decode() for each in documents if is_held_out(each.source)]
    assert 0 < len(held_out) < 100
    assert [json.loads(line)["text"] for line in lines["held-out"]] == held_out
    assert lines["code"]
    monkeypatch.setattr(ablations, "python_docs", lambda limit_bytes: pytest.fail("read again"))
    write_text(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [(["nope"], "no row 'nope'; there are base"), (["--jobs", "0"], "must be a whole number >= 1, got '0'")],
)
def test_mistakes(given, message, capsys):
    with pytest.raises(SystemExit):
        main(given)
    assert message in capsys.readouterr().err


def test_the_file_has_no_other_keys():
    assert set(tomllib.loads(ablations.ROWS.read_text())) == set(read_rows())
