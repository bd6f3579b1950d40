"""The loop: schedules, decay groups, accumulation, resuming, checkpoints that are whole or not there."""

import contextlib
import dataclasses
import threading

import pytest
import torch
from torch import nn

from tests.training.conftest import documents
from training import loop
from training.checkpoint import load_state, read_summary, save_state, write_folder
from training.corpus import prepare
from training.data import Batches
from training.errors import UserError
from training.objectives import Context, next_token
from training.optimizer import make_optimizer
from training.parallel import Ranks
from training.recipe import OptimizerRecipe, StageRecipe
from training.stages import TEACHER
from training.teacher import small_llama

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_learning_rate_rises_then_falls_to_its_floor():
    recipe = StageRecipe(lr=2.0, warmup=0.2, floor=0.1, bytes=1)
    rates = [loop.learning_rate(recipe, f) for f in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.1, 0.2])
    linear = dataclasses.replace(recipe, decay="linear")
    assert loop.learning_rate(linear, 0.4) == pytest.approx(2.0 * (0.1 + 0.9 * 0.75))
    assert loop.learning_rate(dataclasses.replace(recipe, warmup=0.0), 0.0) == pytest.approx(2.0)


def test_decay_falls_on_matrices_only():
    from tests.models.conftest import small_model

    model = small_model(dechunk="causal")
    stage = StageRecipe(lr=1.0, bytes=1, lr_scale={"core.": 0.1, "core.backbone.norm": 0.5})
    adam = make_optimizer(model.named_parameters(), OptimizerRecipe(), stage)
    groups = [group for part in adam.parts for group in part.param_groups]
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    spared = set(names.values()) - decayed
    assert all(name.endswith(("proj.weight", "gate_up.weight", "down.weight", "head.weight", "residual.weight"))
               for name in decayed)  # fmt: skip
    for part in ("embed.weight", "norm.weight", "A_log", ".D", "dt_bias", "conv1d.weight", "conv1d.bias", "null"):
        assert any(name.endswith(part) for name in spared) and not any(name.endswith(part) for name in decayed)
    scales = {names[id(p)]: group["scale"] for group in groups for p in group["params"]}
    assert scales["core.backbone.norm.weight"] == 0.5
    assert scales["core.backbone.layers.0.mlp.up_proj.weight"] == 0.1 and scales["decoder.head.weight"] == 1.0
    with pytest.raises(UserError, match="no trained parameter begins with 'cores'"):
        make_optimizer(model.named_parameters(), OptimizerRecipe(), dataclasses.replace(stage, lr_scale={"cores": 1}))


def run(tokenizer, corpus, folder, *, total=6000, accumulation=1, batch_bytes=512, model=None, every=0.0, log=None):
    torch.manual_seed(0)
    if model is None:
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
        from models.core import use_packed

        model = use_packed(small_llama(tokenizer, intermediate_size=24, **sizes))
    context = Context(model, None, StageRecipe(lr=1e-2, warmup=0.1, bytes=total))
    progress = loop.train(
        model,
        TEACHER.freeze_others(model),
        lambda batch: next_token(context, batch),
        Batches(corpus, window=64, batch_bytes=batch_bytes, seed=3),
        stage=context.recipe,
        optimizer=OptimizerRecipe(),
        accumulation=accumulation,
        ranks=ALONE,
        precision=contextlib.nullcontext(),
        checkpoint=folder,
        checkpoint_seconds=every,
        log=log,
    )
    return model, progress


class Killed(Exception):
    pass


class Unprefetched:
    """What the loop asks of a Prefetcher, without a thread: each batch is built when it is asked for."""

    def __init__(self, batches, device):
        self.batches = batches
        self.state_dict, self.load_state_dict = batches.state_dict, batches.load_state_dict

    def __next__(self):
        return next(self.batches)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @property
    def round_bytes(self):
        return self.batches.round_bytes

    def waiting(self):
        return 0.0


def prefetching_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_killed_run_resumes_with_the_same_bits(tokenizer, corpus, tmp_path, monkeypatch, accumulation):
    """With batches in flight where it was killed; and it is the run that prefetches nothing."""
    options = dict(accumulation=accumulation, total=6000 * accumulation)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Prefetcher", Unprefetched)
        whole, progress = run(tokenizer, corpus, tmp_path / "whole", **options)
    save, saves = loop._save, []

    def save_then_die(*arguments):
        save(*arguments)
        saves.append(1)
        if len(saves) == 4:
            assert prefetching_threads()
            raise Killed

    monkeypatch.setattr(loop, "_save", save_then_die)
    with pytest.raises(Killed):
        run(tokenizer, corpus, tmp_path / "killed", **options)
    assert not prefetching_threads()
    monkeypatch.undo()
    resumed, again = run(tokenizer, corpus, tmp_path / "killed", **options)
    assert not prefetching_threads()
    assert 4 < again.step == progress.step and again.bytes == progress.bytes >= 6000 * accumulation
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Scalars:
    def __init__(self):
        self.values = {}

    def add_scalar(self, tag, value, step):
        self.values.setdefault(tag, {})[step] = value

    def close(self):
        pass


def test_the_wait_for_data_is_logged_and_kept(tokenizer, corpus, tmp_path, monkeypatch):
    scalars = Scalars()
    _, progress = run(tokenizer, corpus, tmp_path / "a", log=lambda step: scalars)
    assert 0 < progress.waited < progress.seconds
    assert progress.data_wait == progress.waited / progress.seconds
    shares = scalars.values["data_wait"]
    assert len(shares) == progress.step and shares[progress.step] == progress.data_wait
    _, again = run(tokenizer, corpus, tmp_path / "a", total=1)  # nothing left to do: as the checkpoint has it
    assert again == progress
    assert dataclasses.replace(progress, waited=2 * progress.seconds).data_wait == 1
    assert loop.Progress().data_wait == 0


def test_training_learns(tokenizer, corpus, tmp_path):
    batch = next(Batches(corpus, window=64, batch_bytes=2048, seed=9))
    model, _ = run(tokenizer, corpus, tmp_path / "a", total=1)
    trained, _ = run(tokenizer, corpus, tmp_path / "b", total=60_000)
    losses = [
        float(next_token(Context(m, None, None), batch).parts["cross_entropy"].detach()) for m in (model, trained)
    ]
    assert losses[1] < 0.7 * losses[0]


def test_accumulation_weighs_every_item_alike(tokenizer, corpus, tmp_path):
    """Two micro-batches in a step give the gradient of their items' common mean, whatever their sizes."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    from models.core import use_packed

    torch.manual_seed(0)
    model = use_packed(small_llama(tokenizer, intermediate_size=24, **sizes))
    context = Context(model, None, StageRecipe(lr=0.0, bytes=1))
    named = TEACHER.freeze_others(model)
    batches = Batches(corpus, window=64, batch_bytes=512, seed=3)
    count, _, _ = loop._accumulate(lambda b: next_token(context, b), batches, 2, ALONE, contextlib.nullcontext())
    ALONE.sum_gradients([p for _, p in named], count)
    found = [p.grad.clone() for _, p in named]
    batches = Batches(corpus, window=64, batch_bytes=512, seed=3)
    losses = [next_token(context, next(batches)) for _ in range(2)]
    assert losses[0].count != losses[1].count
    model.zero_grad()
    (sum(loss.total for loss in losses) / sum(loss.count for loss in losses)).backward()
    for gradient, (name, parameter) in zip(found, named, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, msg=name)
    assert float(count) == sum(int(loss.count) for loss in losses)


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer, corpus, tmp_path):
    model, _ = run(tokenizer, corpus, tmp_path / "a", total=1)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="no longer finite at step 1 .*lower the stage's lr"):
        run(tokenizer, corpus, tmp_path / "b", model=model)


def test_a_checkpoint_of_other_data_is_refused(tokenizer, corpus, tmp_path):
    run(tokenizer, corpus, tmp_path / "c", total=1000)
    other = prepare(documents(seed=5), tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match="does not fit this run: cannot resume batches"):
        run(tokenizer, other, tmp_path / "c", total=2000)


def test_folders_are_whole_or_not_there(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    folder = tmp_path / "result"
    with pytest.raises(UserError, match="cannot write .*result: No space left"):
        write_folder(folder, fail, {})
    assert read_summary(folder) is None and load_state(folder) is None
    save_state(folder, {"x": torch.ones(2)}, {"step": 1})
    with pytest.raises(UserError):
        write_folder(folder, fail, {})
    assert read_summary(folder) == {"step": 1} and load_state(folder)["x"].tolist() == [1, 1]
    folder.rename(tmp_path / ".result.old")  # killed between the two renames
    assert read_summary(folder) == {"step": 1}


def test_a_damaged_checkpoint_is_named(tmp_path):
    save_state(tmp_path / "c", {"x": torch.ones(100)}, {})
    file = tmp_path / "c" / "state.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="checkpoint .* is damaged .*remove it"):
        load_state(tmp_path / "c")


def test_gradients_are_divided_once():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 6.0)
    ALONE.sum_gradients([parameter, nn.Parameter(torch.ones(1))], torch.tensor(2.0))
    assert parameter.grad.tolist() == [3, 3, 3]
