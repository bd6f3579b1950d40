"""What a stage is said to keep against what autograd saves when its objective runs."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models import ByteLM, ByteLMConfig
from models.byte_lm import core_settings
from models.core import use_packed
from training.activations import activations
from training.alignment import TokenBytes
from training.context import Anchor, Context, Teacher
from training.data import Batches
from training.flops import Extras, Rows
from training.noise import Noise
from training.parallel import blocks_of
from training.recipe import StageRecipe, read_recipe
from training.stages import STAGES
from training.teacher import small_llama
from training.vocabulary import vocabulary_of

ABLATED = ["model.encoder=attention", "model.attention_window=512", "model.router=split", "model.suffix_features=true"]


@pytest.fixture(scope="module", params=[[], ABLATED], ids=["", "ablated"])
def quickstart(request, tokenizer):
    """The quickstart's model and teacher (of a smaller vocabulary), and the model's shapes; with overrides or without.

    The window is as long as the sequences: beyond it, on the CPU, attention pads them.
    """
    torch.manual_seed(0)
    recipe = read_recipe("quickstart", request.param)
    teacher = use_packed(small_llama(tokenizer, **recipe.teacher.sizes)).requires_grad_(False)
    vocabulary = vocabulary_of(TokenBytes(tokenizer))
    settings = recipe.model.settings(vocabulary.num_bytes)
    model = ByteLM.from_teacher(teacher, ByteLMConfig(**settings), vocabulary)
    with torch.device("meta"):
        planned = ByteLM(ByteLMConfig(core=core_settings(teacher), **settings))
    return model, planned, teacher


def measured(context, stage, batch, dtype) -> tuple[int, Rows]:
    """Bytes that autograd saves, parameters and their copies left out, and the rows that they are saved for."""
    stage.freeze_others(context.model)
    parameters = list(context.model.parameters())
    shapes = {p.shape for p in parameters} | {p.T.shape for p in parameters if p.ndim == 2}
    kept = {}

    def save(tensor):
        if tensor.shape not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16),
    ):
        stage.objective(context, batch)
    chunks = len(batch.token_ids)
    if stage.name[0] == "2":
        with torch.no_grad():
            chunks = len(context.model(batch.ids, batch.cu_seqlens).routing.index)
    return sum(storage.nbytes() for storage in kept.values()), Rows(len(batch.ids), chunks, len(batch.cu_seqlens) - 1)


@pytest.fixture
def batch(corpus):
    return next(Batches(corpus, window=512, batch_bytes=2048, seed=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", list(STAGES))
def test_the_estimate_is_what_autograd_saves(quickstart, batch, name, dtype):
    """Within a tenth: on the CPU, attention copies its inputs to fp32 and joins its sequences' outputs.

    Within a little more where those inputs are of bytes and in bf16, not of the fewer chunks alone.
    """
    model, planned, teacher = quickstart
    context = Context(model, Teacher(teacher), StageRecipe(lr=1e-3, bytes=1))
    found, rows = measured(context, STAGES[name], batch, dtype)
    estimate = activations(planned, STAGES[name], rows, dtype)
    of_bytes = model.config.encoder == "attention" and dtype is torch.bfloat16
    assert estimate.saved + estimate.logits == pytest.approx(found, rel=0.13 if of_bytes else 0.1)


@pytest.mark.parametrize(
    "numbers",
    [{"consistency_weight": 1.0}, {"anchor_weight": 0.5, "distill_weight": 0.5}, {"byte_marginals": 0.5}],
    ids=str,
)
def test_what_options_keep(quickstart, tokenizer, batch, numbers):
    model, planned, teacher = quickstart
    recipe, stage = StageRecipe(lr=1e-3, bytes=1, **numbers), STAGES["2.2"]
    stage.freeze_others(model)
    vocabulary = vocabulary_of(TokenBytes(tokenizer)).by_prefix(len(tokenizer))
    context = Context(model, Teacher(teacher), recipe, Anchor(model), vocabulary)
    clean = Noise(0.0, ("drop",), 0.1, seed=0).apply(batch)
    found, rows = measured(context, stage, clean, torch.float32)
    estimate = activations(planned, stage, rows, torch.float32, Extras.of("2.2", recipe))
    assert estimate.saved + estimate.logits == pytest.approx(found, rel=0.1)
    plain = activations(planned, stage, rows, torch.float32)
    assert estimate.saved + estimate.logits > plain.saved + plain.logits


@pytest.mark.parametrize("name", ["1.1", "2.1", "2.2"])
def test_checkpointed_blocks_keep_their_inputs_alone(quickstart, batch, name, monkeypatch):
    model, planned, teacher = quickstart
    stage = STAGES[name]
    stage.freeze_others(model)
    for block in blocks_of(model):
        if any(parameter.requires_grad for parameter in block.parameters()):
            monkeypatch.setattr(block, "forward", partial(checkpoint, block.forward, use_reentrant=False))
    context = Context(model, Teacher(teacher), StageRecipe(lr=1e-3, bytes=1))
    found, rows = measured(context, stage, batch, torch.float32)
    estimate = activations(planned, stage, rows, torch.float32)
    kept = estimate.saved - estimate.blocks + estimate.block_inputs
    assert kept + estimate.logits == pytest.approx(found, rel=0.1)
    assert estimate.peak(checkpoint=True) == kept + estimate.largest_block + 2 * estimate.widest
    assert estimate.peak(checkpoint=True) < estimate.peak(checkpoint=False)
