"""FLOPs of each stage against torch's own counter on a small model, whose products and attention it sees."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bytekernels.linear_kl import chunked
from models import ByteLM, ByteLMConfig
from models.suffix import Vocabulary
from training import objectives
from training.alignment import TokenBytes
from training.context import Anchor, Context, Teacher
from training.data import Batches
from training.flops import (
    CoreSizes,
    Extras,
    Flops,
    Rows,
    Sizes,
    attended_pairs,
    next_token_parts,
    stage_flops,
    stage_parts,
)
from training.noise import Noise
from training.recipe import StageRecipe
from training.remembered import Remembered
from training.stages import STAGES
from training.vocabulary import vocabulary_of

aten = torch.ops.aten


def student(teacher, **settings):
    torch.manual_seed(0)
    sizes = dict(
        width=16, encoder_layers=2, decoder_layers=3, state_size=8, head_dim=16, bridge_inner=48, router_inner=24
    )
    vocabulary = Vocabulary([b"a" * settings.get("suffix_bytes", 0)], bos_id=0, eos_id=0)
    return ByteLM.from_teacher(teacher, ByteLMConfig(**sizes, **settings), vocabulary)


def causal(count: int, query) -> float:
    """The share of the square that a causal mask lets through."""
    return count * (query[2] + 1) / (2 * query[2])


def attention(query, key, value, *_, **__) -> float:
    return causal(sdpa_flop_count(query, key, value), query)


def attention_backward(grad, query, key, value, *_, **__) -> float:
    return causal(sdpa_backward_flop_count(grad, query, key, value), query)


def product(total, left, right, **_) -> int:
    """``total.addmm_(left, right)``, from shapes: the form of a product that torch does not count."""
    return 2 * left[0] * left[1] * right[1]


def heads(*args, out_val=None, **_) -> int:
    """The products that linear_kl makes, which happen inside one op."""
    with FlopCounterMode(display=False, custom_mapping={aten.addmm_: product}) as inner:
        chunked.linear_kl(*args)
    return inner.get_total_flops()


heads._get_raw = True  # what FlopCounterMode asks for to be given tensors and not shapes
SEEN = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    torch.ops.bytekernels.linear_kl: heads,
}


def counted(run) -> Flops:
    """What torch counts in ``run()``, a forward pass, and in the backward pass of what it returns."""
    with FlopCounterMode(display=False, custom_mapping=SEEN) as forward:
        loss = run()
    with FlopCounterMode(display=False, custom_mapping=SEEN) as backward:
        loss.total.backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())


@pytest.fixture
def batch(corpus):
    """Sequences of nearly one length, as the estimate takes them to be."""
    return next(Batches(corpus, window=64, batch_bytes=1200, seed=1))


def rows_of(batch, chunks=None) -> Rows:
    return Rows(len(batch.ids), len(batch.token_ids) if chunks is None else chunks, len(batch.cu_seqlens) - 1)


def expected(parts: dict[str, Flops]) -> Flops:
    return parts["products"] + parts["attention"]


def unevenness(sizes, batch, name: str) -> Flops:
    """What the encoder's attention takes more because the batch's sequences are of different lengths."""
    lengths = batch.cu_seqlens.diff().tolist()
    pairs = [sum(attended_pairs(n, sizes.attention_window) for n in those) for those in (lengths, mean_of(lengths))]
    each = 2 * sizes.width * sizes.encoder_layers * (pairs[0] - pairs[1])
    return Flops(2 * each, 5 * each * ("encoder." in STAGES[name].trains))


def mean_of(lengths: list[int]) -> list[float]:
    return [sum(lengths) / len(lengths)] * len(lengths)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dechunk": "causal"},
        {"draft_head": True},
        {"encoder": "attention"},
        {"router": "split"},
        {"suffix_bytes": 9},
        {"suffix_bytes": 9, "marginal_head": True},
    ],
    ids=["hold", "causal", "draft head", "attention", "split router", "suffix features", "marginal head"],
)
@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_counts_what_torch_counts(teacher, batch, name, settings):
    model = student(teacher, **settings)
    context = Context(model, Teacher(teacher), StageRecipe(lr=1e-3, bytes=1))
    stage = STAGES[name]
    stage.freeze_others(model)
    by_router = int(model(batch.ids, batch.cu_seqlens).routing.index.numel()) if name[0] == "2" else None
    sizes, rows = Sizes.of(model.config), rows_of(batch, by_router)
    parts = stage_parts(sizes, name, rows)
    found = counted(lambda: stage.objective(context, batch))
    wanted = expected(parts)
    if model.config.encoder == "attention":
        wanted += unevenness(sizes, batch, name)
    if name in ("1.2", "joint"):  # the student's head has its gradients made in the forward pass
        assert found.total == pytest.approx(wanted.total, rel=0.01)
    else:
        assert found.forward == pytest.approx(wanted.forward, rel=0.01)
        assert found.backward == pytest.approx(wanted.backward, rel=0.01)
    assert stage_flops(sizes, name, rows).total > expected(parts).total  # scans, convolutions and norms come on top


def test_a_stage_that_keeps_distilling_runs_the_teacher_too(teacher, batch):
    model = student(teacher)
    context = Context(model, Teacher(teacher), StageRecipe(lr=1e-3, bytes=1, distill_weight=0.5))
    STAGES["2.2"].freeze_others(model)
    plain, distilled = (
        expected(stage_parts(Sizes.of(model.config), "2.2", rows_of(batch), extras))
        for extras in (Extras(), Extras(distill=True))
    )
    found = counted(lambda: objectives.end_to_end(context, batch))
    without = counted(
        lambda: objectives.next_byte(Context(model, Teacher(teacher), StageRecipe(lr=1e-3, bytes=1)), batch)
    )
    # Of a head that is not trained the op may or may not make the weight's gradient: the figure leaves it out.
    head = 2 * len(batch.token_ids) * model.token_head.weight.numel()
    added, wanted = found.total - without.total, distilled.total - plain.total
    assert wanted * 0.99 <= added <= (wanted + head) * 1.01


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("1.3", {"consistency_weight": 1.0}), ("2.2", {"anchor_weight": 0.5}), ("2.2", {"consistency_weight": 1.0})],
)
def test_options_compute_what_is_counted(teacher, batch, name, numbers):
    """Against the same stage without them, on a batch that noise has left as it was."""
    model, stage = student(teacher), STAGES[name]
    stage.freeze_others(model)
    clean = Noise(0.0, ("drop",), 0.1, seed=0).apply(batch)
    found, wanted = [], []
    for recipe in (StageRecipe(lr=1e-3, bytes=1), StageRecipe(lr=1e-3, bytes=1, **numbers)):
        context = Context(model, Teacher(teacher), recipe, Anchor(model))
        found.append(counted(partial(stage.objective, context, clean)).total)
        parts = stage_parts(Sizes.of(model.config), name, rows_of(batch), Extras.of(name, recipe))
        wanted.append(expected(parts).total)
    # Of a head that is not trained the op may or may not make the weight's gradient: the figure leaves it out.
    head = 2 * len(batch.token_ids) * model.token_head.weight.numel() if "anchor_weight" in numbers else 0
    added, counts = found[1] - found[0], wanted[1] - wanted[0]
    assert counts > 0 and counts * 0.99 <= added <= (counts + head) * 1.01


def test_the_teachers_own_training(teacher, batch):
    teacher.requires_grad_(True)
    context = Context(teacher, None, StageRecipe(lr=1e-3, bytes=1))
    found = counted(lambda: objectives.next_token(context, batch))
    parts = expected(next_token_parts(CoreSizes.of(teacher.config), rows_of(batch)))
    assert found.forward == pytest.approx(parts.forward, rel=0.01)
    assert found.backward == pytest.approx(parts.backward, rel=0.01)


def test_frozen_parts_have_no_backward_pass(teacher):
    sizes = Sizes.of(student(teacher).config)
    rows = Rows(4096, 1024, 8)
    flops = {name: stage_flops(sizes, name, rows) for name in STAGES}
    assert flops["2.1"].forward == flops["2.2"].forward
    assert flops["2.1"].backward < flops["2.2"].backward
    assert flops["1.1"].total < flops["1.2"].total
    assert flops["1.1"].forward < flops["1.3"].forward and flops["1.3"].backward < flops["2.2"].backward


def test_byte_marginals_run_the_teacher_and_its_head(teacher, tokenizer, batch):
    model = student(teacher)
    STAGES["2.1"].freeze_others(model)
    vocabulary = vocabulary_of(TokenBytes(tokenizer)).by_prefix(len(tokenizer))
    recipe = StageRecipe(lr=1e-3, bytes=1, byte_marginals=1.0)
    context = Context(model, Teacher(teacher), recipe, vocabulary=vocabulary)
    parts = stage_parts(Sizes.of(model.config), "2.1", rows_of(batch), Extras.of("2.1", recipe))
    found = counted(lambda: objectives.next_byte(context, batch))
    assert found.total == pytest.approx(expected(parts).total, rel=0.01)
    # What is remembered is not computed again.
    recipe = StageRecipe(lr=1e-3, bytes=1, byte_marginals=1.0, remember_bytes=1)
    context = Context(model, Teacher(teacher), recipe, vocabulary=vocabulary, remembered=Remembered())
    objectives.next_byte(context, batch)
    less = stage_parts(Sizes.of(model.config), "2.1", rows_of(batch), Extras.of("2.1", recipe))
    again = counted(lambda: objectives.next_byte(context, batch))
    assert again.total == pytest.approx(expected(less).total, rel=0.01) and again.total < 0.9 * found.total


def test_a_window_bounds_the_encoders_attention(teacher):
    """In a long sequence each byte attends to a whole window, but for those of the first one."""
    rows, window = Rows(24 * 32, 1, 1), 32
    sizes = Sizes.of(student(teacher, encoder="attention", attention_window=window).config)
    found = stage_parts(sizes, "1.1", rows)["attention"]
    pairs = sizes.encoder_layers * (rows.bytes * window - window * (window - 1) / 2)
    assert found == Flops(4 * sizes.width * pairs, 10 * sizes.width * pairs)


def test_flops_grow_with_the_rows(teacher):
    sizes = Sizes.of(student(teacher).config)
    one, two = (stage_parts(sizes, "2.2", Rows(512 * n, 128 * n, n)) for n in (1, 2))
    assert two["attention"].total == 2 * one["attention"].total
    longer = stage_parts(sizes, "2.2", Rows(1024, 256, 1))
    assert longer["attention"].total > 3.9 * one["attention"].total


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_pairs_are_those_of_the_mask(window):
    reach = window or 7
    assert attended_pairs(7, window) == sum(min(query + 1, reach) for query in range(7))
