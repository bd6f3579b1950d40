"""The command: both suites on small models, a killed run goes on, mistakes take one line."""

import gzip
import json
import math
import shutil

import pytest

from evals import exam, run
from evals.metrics import Answer, metrics_of
from evals.questions import Question
from evals.results import Exam, Scored, summary
from evals.tasks import CORE as CORE_TASKS
from models import ContinuationScore

KNOWN = "piqa, hellaswag, arc_easy"


def arguments(models, data, out, *more) -> list[str]:
    given = ["--model", models.student, "--teacher", models.teacher, "--data", data, "--out", out, *more]
    return [str(word) for word in given]


CORE = ("--suite", "core", "--tasks", "piqa,lambada,gsm8k,mmlu")


@pytest.fixture(scope="module")
def core(models, data, tmp_path_factory):
    """The core suite's folder, and its report."""
    out = tmp_path_factory.mktemp("core")
    (out / "text.md").write_text("The function returns a value.\n\nIt raises an error.\n")
    given = arguments(models, data, out, *CORE, "--text", out / "text.md", "--device", "cpu")
    assert run.main(given) == 0
    return out, json.loads((out / "core.json").read_text()), given


def test_the_report_has_teacher_student_and_retention(core):
    out, report, _ = core
    assert list(report["tasks"]) == ["text", "piqa", "lambada", "gsm8k", "mmlu"]
    assert set(report["models"]) == {"teacher", "student"}
    piqa = report["tasks"]["piqa"]
    assert (piqa["questions"], piqa["metric"]) == (5, "accuracy per byte")
    assert piqa["chance"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 2 + 1 / 2 + 1 / 3) / 5)
    for who in ("teacher", "student"):
        assert set(piqa[who]) == {"accuracy", "accuracy per byte", "bits per byte"}
        assert 0 < report["tasks"]["text"][who]["bits per byte"][0] < 12
    text = report["tasks"]["text"]
    bits = [text[who]["bits per byte"][0] for who in ("teacher", "student")]
    assert text["retention"][0] == pytest.approx(bits[0] / bits[1])
    assert (out / "core.png").read_bytes()[:4] == b"\x89PNG"
    table = (out / "core.md").read_text()
    assert "| task | questions | metric | chance | teacher | student | retention |" in table
    assert "**mean**" in table


def test_the_scores_are_those_of_the_answers_on_disk(core):
    out, report, _ = core
    lines = (out / "answers" / "student" / "piqa.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["fingerprint"] == report["models"]["student"]["fingerprint"]
    gold = [0, 2, 1, 0, 1]
    right = []
    for row in map(json.loads, lines[1:]):
        worth = [ll / size for ll, size, _ in row["scores"]]
        right.append(worth.index(max(worth)) == gold[row["number"]])
    assert report["tasks"]["piqa"]["student"]["accuracy per byte"][0] == pytest.approx(sum(right) / 5)


def test_the_same_command_asks_nothing_again(core, monkeypatch):
    _, report, given = core
    monkeypatch.setattr(exam, "_answers", lambda *_: pytest.fail("asked again"))
    assert run.main(given) == 0
    assert json.loads((core[0] / "core.json").read_text())["tasks"] == report["tasks"]


def test_a_killed_run_goes_on(core, models, data, tmp_path):
    out, report, _ = core
    shutil.copytree(out / "answers", tmp_path / "answers")
    path = tmp_path / "answers" / "student" / "lambada.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "answers" / "student" / "mmlu.jsonl").unlink()
    assert run.main(arguments(models, data, tmp_path, *CORE, "--batch-bytes", "700")) == 0
    again = json.loads((tmp_path / "core.json").read_text())
    for task, row in again["tasks"].items():
        assert row["student"]["accuracy"] == report["tasks"][task]["student"]["accuracy"], task


def test_changed_data_and_a_larger_limit_ask_anew_what_they_must(core, models, data, tmp_path, monkeypatch):
    shutil.copytree(core[0] / "answers", tmp_path / "answers")
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / CORE_TASKS["piqa"].path
    lines = gzip.decompress(path.read_bytes()).decode().replace("blue", "grey")
    path.write_bytes(gzip.compress(lines.encode()))
    asked = []
    real = exam._answers
    monkeypatch.setattr(exam, "_answers", lambda who, batch: asked.extend(batch) or real(who, batch))
    given = ("--suite", "core", "--tasks", "piqa", "--student-only")
    assert run.main(arguments(models, tmp_path / "data", tmp_path, *given)) == 0
    assert [question.number for question in asked] == [1]
    text = tmp_path / "text.md"
    text.write_text("\n".join(f"Sentence {i} is about {i % 7} things." for i in range(60)))
    for limit, name in (("1", "a"), ("2", "a")):
        (tmp_path / f"{limit}.md").write_text(text.read_text())
        asked.clear()
        files = [str(tmp_path / "1.md"), *([str(tmp_path / "2.md")] if limit == "2" else [])]
        given = ("--suite", "noise", "--tasks", "continuation", "--noises", "drop", "--student-only", "--limit", limit)
        assert run.main(arguments(models, data, tmp_path / name, *given, "--text", *files)) == 0
        assert len(asked) == 2  # clean and noised


def test_answers_of_another_model_are_refused_or_overwritten(core, models, data, tmp_path, capsys):
    shutil.copytree(core[0] / "answers", tmp_path / "answers")
    other = arguments(models, data, tmp_path, "--suite", "core", "--tasks", "piqa", "--dtype", "bfloat16")
    assert run.main(other) == 2
    assert "dtype: 'float32' then, 'bfloat16' now" in capsys.readouterr().err
    assert run.main([*other, "--overwrite"]) == 0


def test_the_noise_suite(models, data, tmp_path):
    tasks = ("--suite", "noise", "--tasks", "piqa,sciq,spell", "--noises", "upper_case,drop", "--characters", "3")
    assert run.main(arguments(models, data, tmp_path, *tasks)) == 0
    report = json.loads((tmp_path / "noise.json").read_text())
    assert list(report["noise"]) == ["upper_case", "drop"]
    tasks = ["piqa", "piqa.upper_case", "piqa.drop", "sciq", "sciq.upper_case", "sciq.drop", "spell"]
    assert list(report["tasks"]) == tasks
    for who in ("teacher", "student"):
        scores = {name: report["tasks"][name][who][report["tasks"][name]["metric"]][0] for name in tasks}
        for noise, row in report["noise"].items():
            assert row[who]["score"][0] == pytest.approx((scores[f"piqa.{noise}"] + scores[f"sciq.{noise}"]) / 2)
            kept = [scores[f"{task}.{noise}"] / scores[task] for task in ("piqa", "sciq") if scores[task]]
            if len(kept) == 2:
                assert row[who]["kept"][0] == pytest.approx(sum(kept) / 2)
    clean, upper = ((tmp_path / f"answers/student/piqa{end}.jsonl").read_text() for end in ("", ".upper_case"))
    assert clean.splitlines()[1] != upper.splitlines()[1]
    assert (tmp_path / "noise.png").exists()


def test_continuations_after_noised_beginnings(models, data, tmp_path):
    (tmp_path / "text.md").write_text("The function returns a value where its argument is given.\n" * 20)
    given = ("--suite", "noise", "--tasks", "continuation,piqa", "--noises", "antspeak", "--text", tmp_path / "text.md")
    assert run.main(arguments(models, data, tmp_path, *given)) == 0
    report = json.loads((tmp_path / "noise.json").read_text())
    assert list(report["tasks"]) == ["continuation", "continuation.antspeak", "piqa", "piqa.antspeak"]
    for who in ("teacher", "student"):
        clean, noisy = (report["tasks"][f"continuation{end}"][who]["bits per byte"][0] for end in ("", ".antspeak"))
        assert report["noise"]["antspeak"][who]["bits kept"][0] == pytest.approx(clean / noisy)
        assert report["noise"]["antspeak"][who]["score"] == report["tasks"]["piqa.antspeak"][who]["accuracy per byte"]
    assert "mean bits per byte" in (tmp_path / "noise.md").read_text()


def test_a_model_of_stage_1_by_its_teachers_tokens(models, data, tmp_path):
    given = arguments(models, data, tmp_path, "--suite", "core", "--tasks", "piqa,gsm8k", "--by-tokens")
    given[1] = str(models.stage_1)
    assert run.main(given) == 0
    report = json.loads((tmp_path / "core.json").read_text())
    assert report["models"]["student"]["likelihood"] == "along the teacher's tokens"
    scores = [report["tasks"]["piqa"]["student"]["accuracy per byte"][0]]
    scores.append(report["tasks"]["gsm8k"]["student"]["exact answer"][0])
    assert "exact answer" in report["tasks"]["gsm8k"]["teacher"]
    assert math.isclose(report["mean"]["student"][0], sum(scores) / 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--suite", "core"], "nobody is to be examined: give --model, --teacher or both"),
        (["--model", "m"], "nothing is to be asked: give --suite core, --suite noise or --text"),
        (["--model", "m", "--suite", "core", "--by-tokens"], "--by-tokens needs --model and --teacher"),
        (["--model", "m", "--suite", "core", "--noises", "drop"], "--noises and --noise-all belong to --suite noise"),
        (["--model", "m", "--suite", "core", "--tasks", ","], "names none: ','"),
        (["--teacher", "t", "--suite", "core", "--student-only"], "--student-only examines --model alone: give one"),
        (["--teacher", "t", "--suite", "core", "--beam", "2"], "--beam 2 is for models that are scored in bytes"),
        (["--model", "m", "--suite", "core", "--limit", "0"], "must be a whole number >= 1, got '0'"),
        (["--model", "m", "--text", "x", "--tasks", "piqa"], "--tasks belongs to a suite"),
    ],
)
def test_arguments_that_do_not_fit_together(given, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(given)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--suite", "core", "--tasks", "pika"], f"--tasks pika: no such task in suite core; there are {KNOWN}"),
        (["--suite", "core", "--tasks", "spell"], "--tasks spell: no such task in suite core"),
        (["--suite", "noise", "--tasks", "piqa", "--noises", "fog"], "--noises fog: no such noise; there are antspeak"),
        (["--suite", "core", "--tasks", "piqa", "--model", "/nowhere"], "/nowhere is no folder"),
        (["--suite", "core", "--tasks", "piqa", "--teacher", "/nowhere"], "no teacher at /nowhere"),
        (["--suite", "core", "--tasks", "boolq"], "task boolq: "),
        (["--text", "/nowhere.txt"], "/nowhere.txt"),
        (["--suite", "noise", "--tasks", "continuation"], "--tasks continuation goes on from texts: give --text FILES"),
        (["--suite", "core", "--tasks", "piqa", "--device", "tpu"], "--device tpu: use cuda or cpu"),
    ],
)
def test_mistakes_take_one_line(models, data, tmp_path, given, message, capsys):
    assert run.main(arguments(models, data, tmp_path, *given)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("run.py: ")
    assert message in error


def test_retention_is_a_mean_over_tasks_and_never_of_bits():
    def scored(task: str, metric: str, teacher: list[bool], student: list[bool]) -> Scored:
        questions = [Question(task, i, (("c", "x"),)) for i in range(len(teacher))]
        answers = {
            who: [Answer((ContinuationScore(-1.0, 1, right),)) for right in row]
            for who, row in (("teacher", teacher), ("student", student))
        }
        return Scored(Exam(task, "", metric, questions), {who: metrics_of(questions, a) for who, a in answers.items()})

    found = summary(
        [
            scored("one", "accuracy", [True, True, True, False], [True, False, True, False]),
            scored("two", "accuracy", [True, False], [True, False]),
            scored("text", "bits per byte", [True], [True]),
        ]
    )
    assert found["tasks"]["one"]["retention"][0] == pytest.approx(2 / 3)
    assert found["mean"]["retention"][0] == pytest.approx((2 / 3 + 1) / 2)
    assert found["mean"]["teacher"][0] == pytest.approx((0.75 + 0.5) / 2)
    assert found["tasks"]["text"]["retention"][0] == pytest.approx(1.0)
    assert found["mean"]["tasks"] == found["mean"]["retention over tasks"] == 2

    other = scored("two", "accuracy", [False], [True])
    found = summary([scored("one", "accuracy", [True, False], [True, False]), other])
    assert found["mean"]["retention"][0] == 1.0  # of the task that the teacher can do anything of
    assert (found["mean"]["tasks"], found["mean"]["retention over tasks"]) == (2, 1)
    assert found["tasks"]["two"]["retention"] == [None, None]
    assert found["tasks"]["two"]["teacher"]["accuracy"] == [0.0, None]
    json.dumps(found, allow_nan=False)


def test_noise_in_continuations_too(models, data, tmp_path):
    given = ("--suite", "noise", "--tasks", "piqa", "--noises", "antspeak", "--noise-all", "--student-only")
    exams = run.exams_of(run.parse(arguments(models, data, tmp_path, *given)))
    clean, noisy = (exam.questions[0].pairs[0] for exam in exams)
    assert clean == ("Question: Two and two is\nAnswer:", " four")
    assert noisy == ("Q U E S T I O N :   T W O   A N D   T W O   I S\nA N S W E R :", "   F O U R")


def test_choices_that_lie_in_the_contexts_are_not_noised(models, data, tmp_path, capsys):
    path = data / CORE_TASKS["winogrande"].path
    path.parent.mkdir(parents=True, exist_ok=True)
    requests = [{"context": name, "continuation": " came."} for name in ("Ann", "Eve")]
    rows = [{"doc_id": 0, "label": 1, "request": request} for request in requests]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert run.main(arguments(models, data, tmp_path, "--suite", "noise", "--tasks", "winogrande")) == 2
    assert "--tasks winogrande: its choices are in the contexts" in capsys.readouterr().err
