"""The plan against the models that it is of, its flags, and the teachers that it believes."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import ByteLM, ByteLMConfig
from tests.training.conftest import TINY_RECIPE
from training import plan_command
from training import stage as command
from training.errors import UserError
from training.optimizer import make_optimizer
from training.plan import Machine, plan_run, teacher_config
from training.plan_command import as_dict, parse_size, table
from training.recipe import STAGES, OptimizerRecipe, ParallelRecipe, TeacherConfig, batch_sizes, read_recipe
from training.stages import STAGES as STAGE_OBJECTS
from training.teacher import small_llama


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY_RECIPE.replace("vocab_size = 300", f"vocab_size = {len(tokenizer)}"))
    return read_recipe(str(path))


@pytest.fixture(scope="module")
def student(recipe, tokenizer):
    teacher = small_llama(tokenizer, **recipe.teacher.sizes)
    return ByteLM.from_teacher(teacher, ByteLMConfig(**recipe.model.settings(0)))


def changed(recipe, **parallel):
    return dataclasses.replace(recipe, parallel=ParallelRecipe(**parallel))


def test_parameters_are_those_of_the_model(recipe, student):
    for stage in plan_run(recipe, STAGES, Machine()).stages:
        trained = STAGE_OBJECTS[stage.name].freeze_others(student)
        assert stage.parameters == sum(p.numel() for p in student.parameters())
        assert stage.trained == sum(p.numel() for _, p in trained)


def test_an_anchor_takes_the_memory_of_its_copy(recipe, student):
    anchored = dataclasses.replace(recipe.stage["2.2"], anchor_weight=0.5)
    other = dataclasses.replace(recipe, stage={**recipe.stage, "2.2": anchored})
    (plain,), (held,) = (plan_run(one, ["2.2"], Machine()).stages for one in (recipe, other))
    copied = sum(p.numel() for part in (student.encoder, student.core, student.token_head) for p in part.parameters())
    assert held.memory["weights"] - plain.memory["weights"] == 4 * copied
    assert held.flops > plain.flops and held.memory["masters"] == plain.memory["masters"]


def test_suffix_features_take_the_memory_of_their_table(recipe):
    model = dataclasses.replace(recipe.model, suffix_features=True)
    other = dataclasses.replace(recipe, model=model)
    (plain,), (held,) = (plan_run(one, ["1.1"], Machine()).stages for one in (recipe, other))
    width = recipe.teacher.hidden_size
    table = 4 * recipe.teacher.vocab_size * width
    assert table < held.memory["weights"] - plain.memory["weights"] < 1.1 * table
    assert held.parameters - plain.parameters == held.trained - plain.trained == width**2


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["1.2", "2.1"])
def test_optimizer_and_gradients_are_those_of_a_step(recipe, student, name, kind):
    recipe = dataclasses.replace(recipe, optimizer=OptimizerRecipe(kind=kind))
    trained = STAGE_OBJECTS[name].freeze_others(student)
    mover = make_optimizer(trained, recipe.optimizer, recipe.stage[name])
    for _, parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    gradients = sum(p.grad.nbytes for p in student.parameters() if p.grad is not None)
    mover.step(1e-3)
    states = [state for part in mover.parts for state in part.state.values()]
    moments = sum(tensor.nbytes for state in states for tensor in state.values() if tensor.ndim)
    (planned,) = plan_run(recipe, [name], Machine()).stages
    assert planned.memory["optimizer"] == moments
    assert planned.memory["gradients"] == gradients
    assert planned.memory["masters"] == sum(p.nbytes for p in student.parameters())


def test_devices_share_what_is_cut(recipe):
    """Four devices, in one group and in two; what lies in no block is gathered whole on each."""
    memory = {
        name: plan_run(changed(recipe, shard=shard), ["2.1"], Machine(devices)).stages[0].memory
        for name, shard, devices in (("alone", 0, 1), ("pairs", 2, 4), ("all", 0, 4))
    }
    for part in ("masters", "optimizer"):
        alone, pairs, everyone = (memory[name][part] for name in ("alone", "pairs", "all"))
        assert (pairs, everyone) == (round(alone / 2), round(alone / 4))
    assert memory["all"]["weights"] > 0
    with pytest.raises(UserError, match=r"parallel.shard=3 does not divide the 4 devices"):
        plan_run(changed(recipe, shard=3), ["2.1"], Machine(4))


def test_frozen_parameters_have_no_optimizer_state(recipe):
    stages = {stage.name: stage for stage in plan_run(recipe, STAGES, Machine()).stages}
    for name in STAGES:
        assert stages[name].memory["optimizer"] == 8 * stages[name].trained
    assert stages["1.3"].trained < stages["2.1"].trained + stages["1.1"].trained < stages["2.2"].trained


def test_steps_and_time(recipe):
    slow, fast = (plan_run(recipe, ["2.2"], Machine(2, throughput=rate)).stages[0] for rate in (64, 128))
    assert (slow.batch_bytes, slow.accumulation, slow.steps, slow.bytes) == (256, 1, 4, 2048)
    assert (slow.seconds, fast.seconds) == (16, 8)
    peak, mfu = 1e9, 0.25
    guessed = plan_run(recipe, ["2.2"], Machine(2, mfu=mfu, peak=peak)).stages[0]
    assert guessed.seconds == pytest.approx(guessed.flops * guessed.steps / (2 * mfu * peak))
    assert plan_run(recipe, ["2.2"], Machine(2)).stages[0].seconds is None


def test_a_stage_of_seconds_takes_the_bytes_that_its_time_allows(recipe):
    timed = dataclasses.replace(recipe.stage["2.2"], bytes=None, seconds=10.0)
    recipe = dataclasses.replace(recipe, stage={"2.2": timed})
    assert plan_run(recipe, ["2.2"], Machine()).stages[0].steps is None
    told = plan_run(recipe, ["2.2"], Machine(throughput=1024)).stages[0]
    assert (told.bytes, told.steps, told.seconds) == (10240, 20, 10.0)


def test_batches_make_the_global_batch():
    data = read_recipe("qwen3-4b").data
    stage = read_recipe("qwen3-4b").stage["2.2"]
    assert batch_sizes(data, stage, 8) == (65536, 4)
    assert batch_sizes(data, stage, 64) == (32768, 1)
    assert batch_sizes(data, dataclasses.replace(stage, global_batch_bytes=8192), 8) == (8192, 1)


def test_what_does_not_fit_is_said_with_what_helps(recipe):
    needed = max(stage.total_memory for stage in plan_run(recipe, STAGES, Machine()).stages)
    roomy = plan_run(recipe, STAGES, Machine(memory=2 * needed))
    assert roomy.fits and not roomy.fixes and "It fits in 90%" in table(roomy)
    tight = plan_run(recipe, STAGES, Machine(memory=needed))
    assert not tight.fits and "WARNING: stage" in table(tight) and "will not fit" in table(tight)
    size = next(fix for fix in tight.fixes if fix.startswith("data.batch_bytes="))
    assert size in table(tight)
    batch_bytes = int(size.partition("=")[2])
    smaller = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, batch_bytes=batch_bytes))
    assert plan_run(smaller, STAGES, Machine(memory=needed)).fits
    hopeless = plan_run(recipe, STAGES, Machine(memory=needed // 1000))
    assert not hopeless.fixes and "combine more devices" in table(hopeless)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3.2-3b", 3_212_749_824),
        ("qwen3-4b", 4_022_468_096),
        ("olmo2-1b", 1_484_916_736),
        ("smollm2", 134_515_008),
    ],
)
def test_public_teachers_have_their_published_sizes(name, parameters):
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(teacher_config(read_recipe(name).teacher))
    assert sum(p.numel() for p in teacher.parameters()) == parameters


def test_a_teachers_folder_is_believed_and_the_recipe_checked_against_it(recipe, tokenizer, tmp_path):
    folder = tmp_path / "teacher"
    config = small_llama(tokenizer, **recipe.teacher.sizes).config
    config.save_pretrained(folder)
    found = teacher_config(dataclasses.replace(recipe.teacher, path=str(folder)))
    assert (found.hidden_size, found.vocab_size) == (32, len(tokenizer))
    right = TeacherConfig("llama", 32, 1, 2, 2, 16, 48, len(tokenizer), True, 2048)
    assert teacher_config(dataclasses.replace(recipe.teacher, path=str(folder), config=right)).hidden_size == 32
    wrong = dataclasses.replace(right, hidden_size=64)
    with pytest.raises(UserError, match=r"teacher.config.hidden_size is 64, but the teacher at .* has 32"):
        teacher_config(dataclasses.replace(recipe.teacher, path=str(folder), config=wrong))
    with pytest.raises(UserError, match="nothing tells the sizes of the teacher at nowhere"):
        teacher_config(dataclasses.replace(recipe.teacher, path="nowhere"))
    strange = dataclasses.replace(right, model_type="lama")
    with pytest.raises(UserError, match="teacher.config: .*lama"):
        teacher_config(dataclasses.replace(recipe.teacher, path="nowhere", config=strange))


def test_the_command_prints_a_plan_and_does_nothing_else(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_RECIPE)
    flags = ["--plan", "--stage", "all", "--recipe", str(path), "--devices", "2", "--device-memory", "1KB"]
    assert command.main([*flags, "--throughput", "100", "--json", "plan.json"]) == 0
    printed = capsys.readouterr().out
    assert "WARNING" in printed and "2 devices" in printed and "as given" in printed
    assert {file.name for file in tmp_path.iterdir()} == {"tiny.toml", "plan.json"}
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["name"] for stage in written["stages"]] == list(STAGES) and written["fits"] is False
    assert written["stages"][0]["total_memory"] == sum(written["stages"][0]["memory"].values())
    assert command.main([*flags[:-2], "--mfu", "0.4", "--peak-tflops", "989"]) == 0
    assert "an assumed 40% of 989 TFLOP/s" in capsys.readouterr().out


def test_a_plan_is_plain_numbers(recipe):
    assert json.loads(json.dumps(as_dict(plan_run(recipe, ["1.1"], Machine()))))["fits"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "8"], "--devices is for --plan: add --plan, or leave it out"),
        (["--plan", "--devices", "0"], "--devices must be positive, got 0"),
        (["--plan", "--device-memory", "80"], "a size is a positive number with a unit, such as 80GiB or 80GB; got"),
        (["--plan", "--mfu", "0.4"], "--mfu is a share of --peak-tflops: give both or neither"),
        (["--plan", "--mfu", "4", "--peak-tflops", "1"], r"--mfu is a share in \(0, 1\], got 4.0"),
        (["--plan", "--throughput", "1", "--mfu", "0.4", "--peak-tflops", "1"], "both tell the speed: give one"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    options = command.parse(["--stage", "all", *flags])
    with pytest.raises(UserError, match=message):
        plan_command.run_command(read_recipe("quickstart"), ["1.1"], options)


def test_sizes():
    assert [parse_size(text) for text in ("80GiB", "80GB", "1.5KiB")] == [80 * 2**30, 80 * 10**9, 1536]
    for wrong in ("", "GiB", "80", "-1GB", "80gb", "nanGB"):
        with pytest.raises(UserError, match="a size is a positive number"):
            parse_size(wrong)
