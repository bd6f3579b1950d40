"""The loop: schedules, decay groups, accumulation, resuming, checkpoints that are whole or not there."""

import contextlib
import dataclasses
import os
import signal
import threading

import pytest
import torch

from models.core import use_packed
from tests.training.conftest import documents
from training import loop
from training.checkpoint import read_summary, write_folder
from training.context import Context
from training.corpus import prepare
from training.data import Batches
from training.errors import Preempted, UserError
from training.objectives import Loss, next_token
from training.optimizer import make_optimizer
from training.parallel import Ranks
from training.recipe import OptimizerRecipe, StageRecipe
from training.snapshot import Snapshots
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


class Kept:
    """A log that keeps what it is given."""

    def __init__(self, every=1):
        self.every, self.steps, self.fractions = every, {}, []

    def log(self, step, progress, rate):
        self.steps[progress.step] = (step, dataclasses.replace(progress), rate)

    def progress(self, fraction):
        self.fractions.append(fraction)


def fresh(tokenizer):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    return use_packed(small_llama(tokenizer, intermediate_size=24, **sizes))


def run(tokenizer, corpus, folder, *, total=6000, accumulation=1, model=None, every=0.0, log=None, origin="",
        objective=next_token, kind="adamw", told=()):  # fmt: skip
    model = model or fresh(tokenizer)
    context = Context(model, None, StageRecipe(lr=1e-2, warmup=0.1, bytes=total))
    progress = loop.train(
        model,
        TEACHER.freeze_others(model),
        lambda batch: objective(context, batch),
        Batches(corpus, window=64, batch_bytes=512, seed=3),
        stage=context.recipe,
        optimizer=OptimizerRecipe(kind=kind, max_skipped=2),
        accumulation=accumulation,
        ranks=ALONE,
        precision=contextlib.nullcontext(),
        snapshots=Snapshots(folder, ALONE),
        checkpoint_seconds=every,
        log=lambda progress: contextlib.nullcontext(log or Kept()),
        origin=origin,
        told=told,
    )
    return model, progress


class Killed(Exception):
    pass


class Unprefetched:
    """What the loop asks of a Prefetcher, without a thread: each batch is built when it is asked for."""

    def __init__(self, batches, device):
        self.batches = batches
        self.state_dict, self.load_state_dict = batches.state_dict, batches.load_state_dict
        self.merge_states = batches.merge_states

    def __next__(self):
        return next(self.batches)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def waiting(self):
        return 0.0


def prefetching_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize(("accumulation", "kind"), [(1, "muon"), (3, "adamw")])
def test_a_killed_run_resumes_with_the_same_bits(tokenizer, corpus, tmp_path, monkeypatch, accumulation, kind):
    """With batches in flight where it was killed; and it is the run that prefetches nothing."""
    options = dict(accumulation=accumulation, total=6000 * accumulation, kind=kind)
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


def test_the_wait_for_data_is_told_and_kept(tokenizer, corpus, tmp_path):
    log = Kept()
    _, progress = run(tokenizer, corpus, tmp_path / "a", log=log)
    assert 0 < progress.waited < progress.seconds
    assert progress.data_wait == progress.waited / progress.seconds
    assert list(log.steps) == list(range(1, progress.step + 1))
    assert log.steps[progress.step][1] == progress
    assert log.fractions == sorted(log.fractions)
    assert log.fractions[-1] >= 1
    _, again = run(tokenizer, corpus, tmp_path / "a", total=1)  # nothing left to do: as the snapshot has it
    assert again.step == progress.step
    assert dataclasses.replace(progress, waited=2 * progress.seconds).data_wait == 1
    assert loop.Progress().data_wait == 0


def test_the_log_is_asked_for_some_steps_only(tokenizer, corpus, tmp_path):
    log = Kept(every=4)
    run(tokenizer, corpus, tmp_path / "a", log=log)
    assert list(log.steps) == list(range(1, max(log.steps) + 1, 4))


def test_training_learns(tokenizer, corpus, tmp_path):
    batch = next(Batches(corpus, window=64, batch_bytes=2048, seed=9))
    model, _ = run(tokenizer, corpus, tmp_path / "a", total=1)
    trained, _ = run(tokenizer, corpus, tmp_path / "b", total=60_000)
    losses = [
        float(next_token(Context(m, None, None), batch).parts["cross_entropy"].detach()) for m in (model, trained)
    ]
    assert losses[1] < 0.7 * losses[0]


def test_accumulation_weighs_every_item_alike(tokenizer, corpus):
    """Two micro-batches in a step give the gradient of their items' common mean, whatever their sizes."""
    model = fresh(tokenizer)
    context = Context(model, None, StageRecipe(lr=0.0, bytes=1))
    named = TEACHER.freeze_others(model)
    losses = [next_token(context, batch) for _, batch in zip(range(2), batches_of(corpus), strict=False)]
    assert losses[0].count != losses[1].count
    (sum(loss.total for loss in losses) / sum(loss.count for loss in losses)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in named}
    model.zero_grad()

    found = {}

    class Mover:
        def step(self, rate):
            found.update({name: parameter.grad for name, parameter in named})

    sums = loop.accumulate(
        model, lambda batch: next_token(context, batch), batches_of(corpus), 2, contextlib.nullcontext()
    )
    step = loop.finish_step(sums, named, Mover(), 0.1, 1e9, ALONE, seconds=3.0, stop=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert step.grad_norm == pytest.approx(float(norm), rel=1e-5)
    total = sum(float(loss.total.detach()) for loss in losses) / sum(int(loss.count) for loss in losses)
    assert step.means == {"cross_entropy": pytest.approx(total, rel=1e-6)}
    assert (step.seconds, step.stop, step.finite) == (3.0, True, True)


def batches_of(corpus):
    return Batches(corpus, window=64, batch_bytes=512, seed=3)


def test_a_gradient_is_clipped_to_the_wanted_length(tokenizer, corpus):
    model = fresh(tokenizer)
    named = TEACHER.freeze_others(model)
    context = Context(model, None, StageRecipe(lr=0.0, bytes=1))
    lengths = []

    class Mover:
        def step(self, rate):
            lengths.append(torch.stack([parameter.grad.norm() for _, parameter in named]).norm())

    sums = loop.accumulate(
        model, lambda batch: next_token(context, batch), batches_of(corpus), 1, contextlib.nullcontext()
    )
    step = loop.finish_step(sums, named, Mover(), 0.1, 0.25, ALONE, seconds=0.0, stop=False)
    assert step.grad_norm > 0.25
    assert float(lengths[0]) == pytest.approx(0.25, rel=1e-4)


class Poison:
    """An objective whose n-th and following calls, ``count`` of them, give no finite loss (or gradient)."""

    def __init__(self, first, count, *, gradient_only=False):
        self.calls, self.bad, self.gradient_only = 0, range(first, first + count), gradient_only

    def __call__(self, context, batch):
        loss = next_token(context, batch)
        self.calls += 1
        if self.calls not in self.bad:
            return loss
        if self.gradient_only:
            return loss._replace(total=loss.total * torch.inf)
        return Loss(loss.total * torch.nan, loss.count, {n: v * torch.nan for n, v in loss.parts.items()})


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(tokenizer, corpus, tmp_path, gradient_only):
    log = Kept(every=1000)
    poison = Poison(4, 2, gradient_only=gradient_only)
    model, progress = run(tokenizer, corpus, tmp_path / "a", objective=poison, log=log)
    assert progress.skipped == 2
    assert progress.skipped_in_a_row == 0
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert list(log.steps) == [1, 4, 5]  # a skipped step is always told
    assert not log.steps[4][0].finite


def test_too_many_of_them_in_a_row_stop_the_run(tokenizer, corpus, tmp_path):
    with pytest.raises(UserError, match="not finite in 3 steps in a row, the last of them step 6"):
        run(tokenizer, corpus, tmp_path / "a", objective=Poison(4, 3))
    assert Snapshots(tmp_path / "a", ALONE).newest() is not None


def test_sigterm_leaves_a_checkpoint(tokenizer, corpus, tmp_path):
    """It comes in the middle of step 3; the run that goes on is the one that was never stopped."""
    whole, _ = run(tokenizer, corpus, tmp_path / "whole", every=1e9)
    calls = []

    def objective(context, batch):
        calls.append(batch)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token(context, batch)

    before = signal.getsignal(signal.SIGTERM)
    with loop.told_to_stop() as told, pytest.raises(Preempted, match="told to stop after step [34]; a checkpoint is"):
        run(tokenizer, corpus, tmp_path / "a", objective=objective, every=1e9, told=told)
    assert signal.getsignal(signal.SIGTERM) is before
    resumed, _ = run(tokenizer, corpus, tmp_path / "a", every=1e9)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_frozen_parameters_have_no_gradients_no_state_and_no_place_in_a_checkpoint(tokenizer, corpus, tmp_path):
    model = fresh(tokenizer)
    only = dataclasses.replace(TEACHER, trains=("model.norm",))
    saved = {}

    class Watched(Snapshots):
        def save(self, step, tensors, about):
            saved.update(tensors)
            super().save(step, tensors, about)

    loop.train(
        model, only.freeze_others(model), lambda batch: next_token(Context(model, None, None), batch),
        batches_of(corpus), stage=StageRecipe(lr=1e-2, bytes=1500), optimizer=OptimizerRecipe(), accumulation=1,
        ranks=ALONE, precision=contextlib.nullcontext(), snapshots=Watched(tmp_path, ALONE), checkpoint_seconds=0,
        log=lambda progress: contextlib.nullcontext(Kept()),
    )  # fmt: skip
    owners = {name.split("/")[1] for name in saved if not name.startswith("rng")}
    assert owners == {"model.norm.weight"}
    assert all(parameter.grad is None for parameter in model.parameters())


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
    assert read_summary(folder) is None
    write_folder(folder, lambda partial: (partial / "whole").write_text("x"), {"step": 1})
    with pytest.raises(UserError):
        write_folder(folder, fail, {})
    assert read_summary(folder) == {"step": 1} and (folder / "whole").read_text() == "x"
    folder.rename(tmp_path / ".result.old")  # killed between the two renames
    assert read_summary(folder) == {"step": 1}


def test_a_checkpoint_of_another_beginning_is_refused(tokenizer, corpus, tmp_path):
    run(tokenizer, corpus, tmp_path / "c", total=1000, origin="/models/a")
    with pytest.raises(UserError, match="goes on from /models/a, not from : give the same --from"):
        run(tokenizer, corpus, tmp_path / "c", total=2000)
