"""Recipes: every shipped one reads, every mistake is named."""

import dataclasses
import json
import tomllib

import pytest

from training.errors import UserError
from training.plan import Machine, plan_run
from training.recipe import RECIPES, STAGES, LogRecipe, parse_duration, read_recipe
from training.run_folder import claim_folder, logs_of


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_shipped_recipes_read(name):
    recipe = read_recipe(name)
    assert recipe.name == name and tuple(recipe.stage) == STAGES


@pytest.mark.parametrize("name", ["llama3.2-3b", "qwen3-4b", "olmo2-1b"])
def test_paper_recipes_carry_the_papers_numbers(name):
    recipe = read_recipe(name)
    assert recipe.data.global_batch_bytes == 2_097_152 and recipe.data.window == 8192
    assert (recipe.model.width, recipe.model.router_inner, recipe.model.state_size) == (1536, 8192, 128)
    assert {stage.bytes for stage in recipe.stage.values()} == {10_500_000_000}
    peaks = {name: (stage.lr, stage.warmup) for name, stage in recipe.stage.items()}
    assert peaks == {
        "1.1": (1e-3, 0.2), "1.2": (2e-5, 0.01), "1.3": (1e-3, 0.1), "2.1": (1e-3, 0.1), "2.2": (2e-5, 0.01)
    }  # fmt: skip
    floors = {name: stage.floor for name, stage in recipe.stage.items()}
    assert floors == {"1.1": 0.0, "1.2": 0.1, "1.3": 0.1, "2.1": 0.1, "2.2": 0.1}
    assert recipe.stage["2.2"].lr_scale == dict.fromkeys(("encoder.", "router.", "dechunk.", "decoder."), 2.0)
    assert recipe.stage["1.2"].direction == "reverse"
    optimizer = recipe.optimizer
    assert (optimizer.kind, optimizer.beta1, optimizer.beta2) == ("adamw", 0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.clip) == (0.1, 1.0)
    sizes = recipe.model
    assert (sizes.encoder_layers, sizes.decoder_layers, sizes.expand, sizes.head_dim) == (4, 4, 2, 64)
    assert (sizes.conv_kernel, sizes.bridge_inner) == (4, 8192)


@pytest.mark.parametrize("name", ["llama3.2-3b", "qwen3-4b", "olmo2-1b"])
def test_paper_recipes_fit_eight_devices_of_80_gb(name):
    recipe = read_recipe(name)
    plan = plan_run(recipe, STAGES, Machine(8, memory=80 * 10**9))
    assert plan.fits
    for stage in plan.stages:
        assert stage.batch_bytes * stage.accumulation * 8 == recipe.data.global_batch_bytes


def test_overrides_are_toml_and_bare_words_are_strings():
    recipe = read_recipe("quickstart", ["data.window=1024", 'stage."2.2".lr=1e-4', "model.dechunk=causal"])
    assert (recipe.data.window, recipe.stage["2.2"].lr, recipe.model.dechunk) == (1024, 1e-4, "causal")
    assert recipe.stage["2.1"] == read_recipe("quickstart").stage["2.1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.widht=3"], "unknown key 'model.widht'; did you mean 'width'"),
        (["model.width=big"], "model.width must be int, got 'big'"),
        (["model.width=true"], "model.width must be int, got True"),
        (["model width"], "is not key=value: the '=' is missing"),
        (['stage."3.1".lr=1', 'stage."3.1".bytes=1'], "unknown stage '3.1'; the stages are 1.1"),
        (['stage."2.2".bytes=5'], "stage 2.2: give bytes or seconds"),
        (['stage."2.2".decay=step'], "decay must be linear or cosine, got 'step'"),
        (["precision=fp8"], "precision must be auto or bf16 or fp32, got 'fp8'"),
        (["data=3"], "data must be a table, got 3"),
        (["data.window=2"], "window must hold BOS, a byte and EOS and fit in batch_bytes 8192, got 2"),
        (["data.global_batch_bytes=0"], "global_batch_bytes must be positive, got 0"),
        (["teacher.seconds=0.0"], "teacher: seconds must be positive, got 0.0"),
        (["teacher.num_attention_heads=3"], "num_attention_heads must divide hidden_size 256"),
        (['stage."2.2".warmup=2.0'], "warmup is a share in .* got 2.0"),
        (["parallel.shard=-1"], "parallel: shard must not be negative, got -1"),
        (["parallel.compile=2"], "parallel.compile must be bool, got 2"),
        (["teacher.config.hidden_size=64"], "teacher.config.model_type is missing"),
        (["log.every=0"], "log: every must be positive, got 0"),
        (["log.peak_tflops=0"], "log: peak_tflops must be positive, got 0.0"),
        (["log.wandb="], "log: wandb names a project, got ''; leave it out for none"),
        (["log.jsonl=1"], "log.jsonl must be bool, got 1"),
        (["optimizer.kind=sgd"], "kind must be adamw or muon, got 'sgd'"),
        (["model.dechunk=mean"], "model: .*dechunk must be one of hold, causal, lookahead, got 'mean'"),
        (["model.head_dim=7"], "model: .*head_dim must divide"),
        (["model.draft_head=true", "model.lookahead=false"], "model: .*draft_head=True needs lookahead=True"),
        (['stage."2.1".draft_weight=0.0'], "stage 2.1: draft_weight must be positive, got 0.0"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        read_recipe("quickstart", overrides)


def test_a_teachers_sizes_must_be_positive():
    with pytest.raises(UserError, match="teacher.config: num_hidden_layers must be positive, got 0"):
        read_recipe("olmo2-1b", ["teacher.config.num_hidden_layers=0"])


def test_documented_log_table_reads():
    page = (RECIPES.parents[1] / "docs" / "metrics.md").read_text()
    table = tomllib.loads(page.split("```toml\n")[1].split("```")[0])["log"]
    log = read_recipe("quickstart", [f"log={{{', '.join(f'{k}={json.dumps(v)}' for k, v in table.items())}}}"]).log
    assert dataclasses.asdict(log) == table
    unset = dataclasses.asdict(LogRecipe())
    assert all(table[name] == value for name, value in unset.items() if value is not None)


def test_missing_recipe_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no recipe 'nope': give a .toml file or one of .*quickstart"):
        read_recipe("nope")
    broken = tmp_path / "broken.toml"
    broken.write_text("a = [")
    with pytest.raises(UserError, match="broken.toml"):
        read_recipe(str(broken))


def test_budget_scales_every_time_to_the_sum():
    recipe = read_recipe("quickstart").scaled(180.0)
    total = recipe.teacher.seconds + sum(stage.seconds for stage in recipe.stage.values())
    assert total == pytest.approx(180)
    borrowed = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, path="x")).scaled(60)
    assert sum(stage.seconds for stage in borrowed.stage.values()) == pytest.approx(60)
    with pytest.raises(UserError, match="measured in seconds"):
        read_recipe("olmo2-1b").scaled(60)


def test_durations():
    assert [parse_duration(t) for t in ("90", "90s", "3m", "1.5h")] == [90, 90, 180, 5400]
    for wrong in ("", "m", "-3m", "3 weeks", "inf", "nan"):
        with pytest.raises(UserError, match="a duration is a positive number"):
            parse_duration(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['data.paths=["a.txt"]', "data.stream=true", "data.limit_bytes=10"], "data: a stream reads on"),
        (["data.streams=0"], "data: streams must be positive, got 0"),
        (["data.shuffle_bytes=-1"], "data: shuffle_bytes must be positive, got -1"),
        (["data.workers=-1"], "data: workers must be 0 or more, got -1"),
    ],
)
def test_streams_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        read_recipe("quickstart", settings)


def test_what_has_no_part_in_the_result_may_change_on_resume(tmp_path):
    def claim(*overrides):
        recipe = read_recipe("quickstart", overrides)
        claim_folder(recipe, tmp_path, ["1.1"], resume=True, overwrite=False, start=None)

    claim()
    logs_of(tmp_path, "1.1").mkdir(parents=True)
    claim("data.workers=3", "data.shuffle_bytes=1000000", "optimizer.max_skipped=3", "log.every=1", "parallel.shard=2")
    with pytest.raises(UserError, match=r"made with other numbers \(data.window: 512 then, 256 now\)"):
        claim("data.window=256")
