"""Curricula other than the paper's, and what goes with a whole run of them: reports, resuming, teachers, other text."""

import dataclasses
import json
import shutil
from itertools import count, pairwise

import pytest
import torch

from models import ByteLM
from tests.training.conftest import TINY_RECIPE
from training import export, loop, stage
from training.checkpoint import read_summary
from training.errors import UserError
from training.parallel import Ranks
from training.recipe import read_recipe, recipe_from
from training.run import Run
from training.student import load_student

# One worker of xdist runs them all: what they share is made once.
pytestmark = pytest.mark.xdist_group("curriculum")

JOINT_TABLE = """
[stage.joint]
lr = 1e-3
bytes = 2048
boundary_weight = 0.5
"""
NOISE = ["noise_share=0.5", "consistency_weight=0.5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a recipe in bytes that has a joint stage, prose, code, and a cache."""
    folder = tmp_path_factory.mktemp("curriculum")
    recipe = TINY_RECIPE.replace("seconds = 1.0", "seconds = 0.1").replace("distill_weight = 0.1", "")
    (folder / "tiny.toml").write_text(recipe + JOINT_TABLE)
    (folder / "prose.md").write_text("\n\n".join(f"Sentence {i} is about {i % 7} things.\n" * 40 for i in range(400)))
    (folder / "code.txt").write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}\n" * 40 for i in range(400)))
    return folder


def command(home, out, *arguments, data="prose.md", expect=0):
    given = ["--recipe", home / "tiny.toml", "--data", home / data, "--cache", home / "cache", "--out", home / out]
    assert stage.main([str(word) for word in (*arguments, *given)]) == expect
    return home / out


def sets(*assignments):
    return [word for one in assignments for word in ("--set", one)]


def order(*names):
    return sets(f"curriculum={json.dumps(names)}")


def report_of(out):
    return json.loads((out / "report.json").read_text())


def weights(folder):
    return ByteLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    "names",
    [("1.2", "1.3", "2.1", "2.2"), ("1.3", "1.2", "1.1", "2.1", "2.2"), ("joint", "2.1", "2.2")],
    ids=["skipped", "reversed", "joint"],
)
def test_stages_run_in_the_curriculums_order(home, names):
    out = command(home, f"run-{'-'.join(names)}", "--stage", "all", *order(*names))
    report = report_of(out)
    assert [row["stage"] for row in report["stages"]] == list(names)
    assert sorted(path.name for path in (out / "stages").iterdir()) == sorted(names)
    assert report["boundary_f1"] == report["stages"][-1]["after"]["f1"] and 0 < report["student_bpb"] < 10
    for before, after in pairwise(names):
        assert torch.equal(weights(out / "stages" / before)["router.q_proj.down.weight"],
                           weights(out / "stages" / after)["router.q_proj.down.weight"]) == (
            after not in ("1.3", "joint", "2.2"))  # fmt: skip
    assert export.main([str(out), str(home / f"export-{names[0]}")]) == 0  # the last one's
    kept, last = load_student(home / f"export-{names[0]}"), load_student(out / "stages" / "2.2")
    assert torch.equal(kept.decoder.head.weight, last.decoder.head.weight)


def test_one_stage_goes_on_from_the_one_before_it_in_the_curriculum(home, capsys):
    skip = order("1.2", "1.3")
    command(home, "single", "--stage", "1.3", *skip, expect=2)
    assert "stage 1.3 starts from stage 1.2, which has no result" in capsys.readouterr().err
    command(home, "single", "--stage", "1.1", *skip, expect=2)
    assert "has no stage 1.1 in its curriculum; it has 1.2, 1.3: set curriculum" in capsys.readouterr().err
    command(home, "single", "--stage", "1.2", *skip)
    out = command(home, "single", "--stage", "1.3", *skip)
    assert sorted(path.name for path in (out / "stages").iterdir()) == ["1.2", "1.3"]
    command(home, "single", "--stage", "1.1", *order("1.1", "1.3"), expect=2)
    assert "stage 1.3 in" in (error := capsys.readouterr().err) and "other numbers (curriculum" in error
    command(home, "single", "--stage", "1.1", *order("1.1", "1.3"), "--overwrite")  # another curriculum's are given up
    assert [path.name for path in (out / "stages").iterdir()] == ["1.1"]


def test_stage_1_1_learns_from_the_vocabulary(home):
    options = sets('stage."1.1".vocabulary_share=1', 'stage."1.1".vocabulary_rate=1')
    out = command(home, "vocabulary", "--stage", "1.1", *order("1.1"), *options)
    plain = command(home, "no-vocabulary", "--stage", "1.1", *order("1.1"))
    row, other = (read_summary(folder / "stages" / "1.1") for folder in (out, plain))
    assert row["before"] == other["before"]  # of the same model, on the same text
    assert row["after"]["mse"] < row["before"]["mse"]
    assert row["after"] != other["after"]


def test_stage_2_learns_the_teachers_marginals(home):
    options = (f'stage."{name}".byte_marginals={share}' for name, share in (("2.1", 1.0), ("2.2", 0.5)))
    out = command(home, "marginals", "--stage", "all", *order("1.2", "2.1", "2.2"), *sets(*options))
    assert 0 < report_of(out)["student_bpb"] < 10
    logs = [json.loads((out / "logs" / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("2.1", "2.2")]
    assert logs[0]["marginals"] > 0 and logs[0]["cross_entropy"] < logs[0]["marginals"]
    assert logs[1]["marginals"] > 0 and logs[1]["cross_entropy"] > 0.5


def test_stage_2_1_remembers_a_small_text(home):
    options = sets('stage."2.1".byte_marginals=0.5', 'stage."2.1".remember_bytes=500')
    names = ("1.2", "2.1")
    out = command(home, "remembered", "--stage", "all", *order(*names), *options)
    plain = command(home, "all-text", "--stage", "all", *order(*names), *sets('stage."2.1".byte_marginals=0.5'))
    row, other = (read_summary(folder / "stages" / "2.1") for folder in (out, plain))
    assert row["before"] == other["before"] and row["bytes"] >= 2048
    assert row["after"]["cross_entropy"] < row["before"]["cross_entropy"]
    assert row["after"] != other["after"]


WITH_MARGINALS = [
    f"curriculum={json.dumps(('1.1', '1.3', '2.1', '2.2'))}", "model.suffix_features=true", "model.marginal_head=true"
]  # fmt: skip


@pytest.fixture(scope="module")
def marginal_run(home):
    return command(home, "marginal-head", "--stage", "all", *sets(*WITH_MARGINALS))


def test_a_marginal_head_begins_as_the_teacher(home, marginal_run):
    """Its untrained student of stage 2.1 is held against one without: on tokens that the router finds or not."""
    out, plain = marginal_run, command(home, "no-marginal-head", "--stage", "all", *sets(*WITH_MARGINALS[:2]))
    row, other = (read_summary(folder / "stages" / "2.1") for folder in (out, plain))
    assert row["before"]["bits_per_byte"] < 0.8 * other["before"]["bits_per_byte"]
    assert row["after"]["cross_entropy"] < row["before"]["cross_entropy"]
    assert report_of(out)["student_bpb"] < report_of(plain)["student_bpb"]
    assert ByteLM.from_pretrained(out / "model").config.token_head
    assert export.main([str(out), str(out / "exported")]) == 0
    kept, found = weights(out / "stages" / "2.2"), weights(out / "exported")
    assert kept.keys() == found.keys() and torch.equal(kept["token_head.weight"], found["token_head.weight"])


def test_chunks_may_be_held_to_the_vocabulary_from_any_stage(home, marginal_run):
    """The same weights and text: where chunks are tokens, bytes are likelier before anything is learnt for it."""
    free = read_summary(marginal_run / "stages" / "2.2")
    options = sets(*WITH_MARGINALS[1:], 'curriculum=["2.2"]', "model.constrain_chunks=true", "model.chunk_cost=1")
    out = command(home, "constrained", "--stage", "all", "--from", marginal_run / "stages" / "2.1", *options)
    held = read_summary(out / "stages" / "2.2")
    assert held["before"]["bits_per_byte"] < 0.95 * free["before"]["bits_per_byte"]
    assert held["after"]["cross_entropy"] < held["before"]["cross_entropy"]
    assert report_of(out)["student_bpb"] < report_of(marginal_run)["student_bpb"]
    config = ByteLM.from_pretrained(out / "model").config
    assert (config.constrain_chunks, config.chunk_cost) == (True, 1)


def test_a_control_has_no_marginal_head(home, marginal_run, monkeypatch):
    """Nothing would train the fresh token head that it would read."""
    recipe = read_recipe(str(home / "tiny.toml"), WITH_MARGINALS)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, paths=(str(home / "prose.md"),)))
    run = Run(recipe, marginal_run, home / "cache", Ranks(0, 1, torch.device("cpu")))
    run.prepare()
    trained = []
    monkeypatch.setattr(run, "_control_recipe", lambda: recipe.stage["2.2"])
    monkeypatch.setattr(
        run, "_train", lambda _, context, folder: context.model.save_pretrained(trained.append(folder) or folder)
    )
    model, _ = run.run_control()
    assert trained == [marginal_run / "stages" / "control"] and not model.config.marginal_head


def test_a_marginal_head_may_come_with_stage_2(home):
    names = ("1.1", "1.3")
    out = command(home, "stage-1", "--stage", "all", *order(*names), *sets("model.suffix_features=true"))
    config = ByteLM.from_pretrained(out / "stages" / "1.3").config
    other = load_student(out / "stages" / "1.3", type(config).from_dict({**config.to_dict(), "marginal_head": True}))
    assert not other.decoder.head.weight.any() and other.config.marginal_head
    with pytest.raises(UserError, match=r"trained with model.marginal_head=False, and the recipe has True, for which"):
        load_student(out / "stages" / "1.3", other.config, decoder_is_trained=True)
    kept = weights(out / "stages" / "1.3")
    model = ByteLM.from_pretrained(out / "stages" / "1.3")
    model.drop_token_head()
    model.save_pretrained(out / "finished")
    with pytest.raises(UserError, match="finished has lost its token head, which marginal_head reads"):
        load_student(out / "finished", other.config)
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items() if "decoder." not in name)


def test_a_memory_is_of_one_process(tmp_path):
    recipe = read_recipe("quickstart", ['stage."2.1".remember_bytes=4000'])
    run = Run(recipe, tmp_path / "run", tmp_path / "cache", Ranks(0, 2, torch.device("cpu")))
    with pytest.raises(UserError, match="stage 2.1: remember_bytes is for one process, and there are 2"):
        run.check(["2.1"], None, False)


def test_suffix_features_go_through_all_stages(home):
    names = ("1.1", "1.2", "1.3", "2.1", "2.2")
    options = (*order(*names), *sets("model.suffix_features=true"))
    out = command(home, "suffix", "--stage", "all", *options)
    first, *_ = rows = report_of(out)["stages"]
    assert first["before"]["cosine"] > 0.5  # of an untrained encoder: most strings are the tokens
    assert first["before"]["cosine"] > read_summary(command(
        home, "no-suffix", "--stage", "1.1", *order(*names)) / "stages" / "1.1")["after"]["cosine"]  # fmt: skip
    assert [row["stage"] for row in rows] == list(names) and 0 < report_of(out)["student_bpb"] < 10
    kept = [weights(out / "stages" / name) for name in names]
    for name in ("text", "sizes", "ends", "table"):
        assert all(torch.equal(one[f"encoder.suffix.{name}"], kept[0][f"encoder.suffix.{name}"]) for one in kept)
    maps = [one["encoder.suffix.map.weight"] for one in kept]
    assert not torch.equal(maps[0], torch.eye(len(maps[0]))) and not torch.equal(maps[0], maps[1])
    assert torch.equal(maps[1], maps[2]) and torch.equal(maps[2], maps[3]) and not torch.equal(maps[3], maps[4])


def test_a_curriculum_is_planned(home, capsys):
    command(home, "none", "--stage", "all", *order("joint", "2.1"), *sets("stage.joint.noise_share=1"), "--plan")
    stages = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert stages.count("joint") == stages.count("2.1") == 2 and "1.1" not in stages


def test_a_curriculum_without_a_decoder_has_no_bits_per_byte(home, capsys):
    out = command(home, "prose", "--stage", "all", *order("1.1", "1.2", "1.3"))
    assert "none: no stage of this curriculum trains the byte-level decoder" in capsys.readouterr().out
    report = report_of(out)
    assert report["student_bpb"] is None and report["teacher_forced_leaking_bits"] is None
    assert load_student(out / "model").config.token_head


def test_stage_2_on_other_text_with_the_same_teacher(home):
    """The two commands of docs/training.md."""
    prose = command(home, "first", "--stage", "all", *order("1.1", "1.2", "1.3"))
    teacher = report_of(prose)["teacher_folder"]
    start = ["--from", prose / "stages" / "1.3", "--teacher", teacher]
    code = command(home, "second", "--stage", "all", *order("2.1", "2.2"), *start, data="code.txt")
    report = report_of(code)
    assert report["teacher_folder"] == teacher and [row["stage"] for row in report["stages"]] == ["2.1", "2.2"]
    found, expected = weights(code / "stages" / "2.1"), weights(prose / "stages" / "1.3")
    assert all(torch.equal(found[name], value) for name, value in expected.items() if name.startswith("core."))


def test_a_leaking_model_is_reported_as_such(home, capsys):
    out = command(home, "leaking", "--stage", "all", *order("1.1", "2.1"), *sets("model.dechunk=lookahead"))
    report = report_of(out)
    assert report["student_bpb"] is None and report["retention"] is None
    assert 0 < report["teacher_forced_leaking_bits"] < 10
    shown = capsys.readouterr().out
    assert f"teacher-forced, leaks: {report['teacher_forced_leaking_bits']:.4f}" in shown
    assert "bits/byte (bound" not in shown


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "olmo2"])
def test_a_teacher_of_each_family_teaches(home, architecture):
    choice = sets(f"teacher.architecture={architecture}", "teacher.seconds=0.001")
    out = command(home, architecture, "--stage", "1.2", *order("1.2"), *choice)
    model = load_student(out / "stages" / "1.2")
    assert model.config.core["model_type"] == architecture
    row = json.loads((out / "stages" / "1.2" / "complete.json").read_text())
    assert row["after"]["kl"] > 0 and row["skipped"] == 0
    before = {path.name for path in (home / "cache").glob("teacher-*")}
    command(home, f"{architecture}-again", "--stage", "1.2", *order("1.2"), *choice)
    assert {path.name for path in (home / "cache").glob("teacher-*")} == before  # found again


def test_options_train_and_a_resumed_stage_ends_with_the_same_bits(home, tmp_path):
    """Noise, consistency and the anchor need nothing of a checkpoint: stopped half-way, a stage ends as it would."""
    options = sets(*(f'stage."2.2".{one}' for one in (*NOISE, "anchor_weight=0.5", "bytes=6144")))
    through = command(home, "through", "--stage", "all", *order("1.2", "2.2"), *options)
    logs = [json.loads(line) for line in (through / "logs" / "2.2" / "metrics.jsonl").read_text().splitlines()]
    assert {"consistency", "anchor", "boundary", "cross_entropy"} <= set(logs[0])
    assert logs[0]["anchor"] == pytest.approx(0, abs=1e-5) and logs[-1]["anchor"] > logs[0]["anchor"]
    half = home / "half"
    shutil.copytree(through, half)
    for gone in ("stages/2.2", "logs/2.2", "model"):
        shutil.rmtree(half / gone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "finish_step", stopping_after(5))
        command(home, "half", "--stage", "2.2", *order("1.2", "2.2"), *options)
    assert (half / "stages" / "2.2.checkpoint").is_dir()
    command(home, "half", "--stage", "2.2", *order("1.2", "2.2"), *options, "--resume")
    found, expected = weights(half / "stages" / "2.2"), weights(through / "stages" / "2.2")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def stopping_after(steps):
    """The loop's step, the last of so many told to stop as SIGTERM would."""
    finish, number = loop.finish_step, count(1)

    def step(*args, **kwargs):
        return finish(*args, **{**kwargs, "stop": next(number) == steps})

    return step


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["curriculum=[]"], "curriculum is empty: name a stage, or leave it out"),
        (['curriculum=["1.1", "3.1"]'], "curriculum: unknown stage '3.1'; the stages are 1.1, .* and joint"),
        (['curriculum=["1.1", "1.2", "1.1"]'], "curriculum names stage 1.1 twice: .* leave one out"),
        (
            ['curriculum=["joint", "2.1"]'],
            "curriculum names stage joint, which has no numbers: add a table",
        ),
        (["curriculum=1.1"], "curriculum must be tuple, got 1.1"),
        (["teacher.architecture=gpt2"], "architecture must be llama or qwen3 or olmo2, got 'gpt2'"),
        (['stage."1.3".noise_share=2.0'], "stage 1.3: noise_share is a share in .* got 2.0"),
        (['stage."1.3".noise_rate=0.0'], "stage 1.3: noise_rate must be positive, got 0.0"),
        (['stage."1.3".noise_kinds=["drip"]'], "noise_kinds must be some of upper, .* got 'drip'"),
        (['stage."1.3".noise_kinds=[]'], "noise_kinds is empty: name some of upper"),
        (['stage."1.3".consistency_weight=1.0'], "compares noised bytes with clean ones: give a noise_share too"),
        (['stage."2.1".consistency_weight=1.0'], "stage 2.1: consistency_weight is for stages that train the router"),
        (['stage."2.1".anchor_weight=1.0'], "stage 2.1: anchor_weight is for stage 2.2 alone, got 1.0"),
        (['stage."1.2".vocabulary_share=0.5'], "stage 1.2: vocabulary_share is for stage 1.1 alone, got 0.5"),
        (['stage."1.1".vocabulary_share=1.5'], "stage 1.1: vocabulary_share is a share in .* got 1.5"),
        (
            ['stage."1.1".vocabulary_share=0.5', 'stage."1.1".noise_share=0.5'],
            "vocabulary_share and noise_share change the same text",
        ),
        (
            ['stage."1.1".vocabulary_share=0.5', "data.stream=true"],
            "stage 1.1: vocabulary_share counts tokens in a text that is prepared",
        ),
        (['stage."1.2".byte_marginals=0.5'], "stage 1.2: byte_marginals is for stages 2.1 and 2.2, got 0.5"),
        (
            ['stage."2.1".byte_marginals=0.5', 'stage."2.1".noise_share=0.5'],
            "byte_marginals are the teacher's of clean text, and noise_share changes it",
        ),
        (
            ['stage."2.2".remember_bytes=1000'],
            "stage 2.2: remember_bytes is for stage 2.1, whose core is frozen, alone",
        ),
        (['stage."2.1".remember_bytes=0'], "stage 2.1: remember_bytes must be positive, got 0"),
        (
            ['stage."2.1".remember_bytes=1000', "data.stream=true"],
            "stage 2.1: remember_bytes is of text that is prepared, and a stream reads on",
        ),
        (
            ['stage."2.1".byte_marginals=0.5', "model.lookahead=false"],
            "stage 2.1: byte_marginals go by the tokenizer's chunk ends, and model.lookahead=false by their starts",
        ),
        (["control.anchor_weight=1.0"], "control: anchor_weight is for stage 2.2 alone"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        read_recipe("quickstart", overrides)


def test_the_papers_variants_can_be_set_on_the_quickstart():
    for one in ("model.draft_head=true", "model.dechunk=causal", "model.dechunk=lookahead", "model.dechunk=hold"):
        key, value = one.removeprefix("model.").split("=")
        assert str(getattr(read_recipe("quickstart", [one]).model, key)).lower() == value
    for direction in ("forward", "reverse"):
        assert read_recipe("quickstart", [f'stage."1.2".direction={direction}']).stage["1.2"].direction == direction
    assert read_recipe("quickstart").order == ("1.1", "1.2", "1.3", "2.1", "2.2")


def test_a_decoder_without_a_trained_router_has_bits_and_no_f1(home, capsys):
    out = command(home, "untrained-router", "--stage", "all", *order("1.2", "2.1"))
    report = report_of(out)
    assert report["boundary_f1"] is None and 0 < report["student_bpb"] < 10
    assert "boundary F1" not in capsys.readouterr().out


def test_a_run_from_before_a_key_came_is_resumed(home):
    out = command(home, "older", "--stage", "1.3", *order("1.3", "2.1"))
    mark = out / "recipe.json"
    recipe = json.loads(mark.read_text())
    del recipe["stage"]["1.3"]["noise_rate"], recipe["teacher"]["bytes"], recipe["model"]["router_layers"]
    mark.write_text(json.dumps(recipe))
    command(home, "older", "--stage", "2.1", *order("1.3", "2.1"), "--resume")
    assert (out / "stages" / "2.1").is_dir()


def test_joint_stands_in_no_order_of_its_own():
    joint = ["stage.joint.lr=1e-3", "stage.joint.bytes=1000"]
    with pytest.raises(UserError, match="stage joint is in no order of its own: give a curriculum that names it"):
        read_recipe("quickstart", joint)
    with pytest.raises(UserError, match="there is no stage: add a table"):
        recipe_from({"name": "empty", "stage": {}})


def test_each_stage_may_have_a_budget_of_its_own(home, capsys):
    names = order("1.1", "1.2", "1.3")
    out = command(home, "budgets", "--stage", "1.1", "--budget", "0.6s", *names)
    command(home, "budgets", "--stage", "1.2", "--budget", "0.3s", *names)
    lengths = {name: one["seconds"] for name, one in json.loads((out / "recipe.json").read_text())["stage"].items()}
    assert (lengths["1.1"], lengths["1.2"]) == (0.6, 0.3)
    assert read_summary(out / "stages" / "1.1")["seconds"] >= 0.6 > read_summary(out / "stages" / "1.2")["seconds"]
    command(home, "budgets", "--stage", "1.3", *names, *sets('stage."1.1".lr=1.0'), expect=2)
    assert "stage 1.1 in" in (error := capsys.readouterr().err) and "stage.1.1.lr" in error
    rest = ["--stage", "all", "--resume", "--out", str(out), "--cache", str(home / "cache")]
    assert stage.main(rest) == 0  # as the folder has it
    assert [row["stage"] for row in report_of(out)["stages"]] == ["1.1", "1.2", "1.3"]


def test_a_budget_is_that_of_the_curriculum():
    recipe = read_recipe("quickstart", ['curriculum=["1.2", "2.1"]']).scaled(60)
    assert recipe.teacher.seconds + sum(recipe.stage[name].seconds for name in recipe.order) == pytest.approx(60)
