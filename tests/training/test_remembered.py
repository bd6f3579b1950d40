"""A fixed text's chunks are computed once, and the loss is the same."""

import pytest
import torch

from bytekernels import BOS, routing_of
from models import ByteLM, ByteLMConfig
from training import objectives
from training.alignment import TokenBytes
from training.context import Context, Teacher
from training.data import Batches
from training.remembered import Remembered
from training.stage_recipe import StageRecipe
from training.stages import STAGES
from training.vocabulary import vocabulary_of

SIZES = dict(width=16, encoder_layers=1, decoder_layers=1, state_size=8, head_dim=16, bridge_inner=32, router_inner=16)


@pytest.fixture
def batches(corpus):
    return Batches(corpus, window=64, batch_bytes=600, seed=1)


@pytest.fixture
def contexts(teacher, tokenizer):
    """A stage 2.1 that computes, and one that remembers, of the same models."""
    vocabulary = vocabulary_of(TokenBytes(tokenizer)).by_prefix(teacher.get_output_embeddings().weight.shape[0])

    def make(**numbers) -> tuple[Context, Context]:
        torch.manual_seed(0)
        model = ByteLM.from_teacher(teacher, ByteLMConfig(**SIZES))
        torch.nn.init.normal_(model.dechunk.residual.weight, std=0.1)
        STAGES["2.1"].freeze_others(model)
        common = (model, Teacher(teacher), StageRecipe(lr=1e-3, bytes=1, **numbers), None, vocabulary)
        return Context(*common), Context(*common, Remembered())

    return make


def rows_read(module, counted) -> list:
    """Numbers of rows of each forward pass of ``module``, added as they come."""
    found = []
    module.register_forward_pre_hook(lambda _, args, kwargs: found.append(counted(args, kwargs)), with_kwargs=True)
    return found


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_loss_and_its_gradient_are_the_same(contexts, batches, share):
    plain, remembering = contexts(byte_marginals=share)
    first, second = next(batches), next(batches)
    for batch in (first, second, first):
        found = []
        for context in (plain, remembering):
            context.model.zero_grad()
            loss = objectives.next_byte(context, batch)
            loss.total.backward()
            found.append((loss, [p.grad.clone() for p in context.model.parameters() if p.requires_grad]))
        (loss, gradients), (other, others) = found
        torch.testing.assert_close(other.parts, loss.parts, rtol=1e-6, atol=0)
        torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)


def test_a_sequence_goes_through_frozen_transformers_once(contexts, batches):
    _, context = contexts(byte_marginals=1.0)
    core = rows_read(context.model.core, lambda args, _: len(args[0]))
    teacher = rows_read(context.teacher, lambda args, _: len(args[0].token_ids))
    first, second = next(batches), next(batches)
    both = torch.cat([first.cu_seqlens, second.cu_seqlens[1:] + first.cu_seqlens[-1]])
    joined = type(first)(
        torch.cat([first.ids, second.ids]),
        both,
        torch.cat([first.token_end, second.token_end]),
        torch.cat([first.token_ids, second.token_ids]),
        torch.cat([first.token_cu, second.token_cu[1:] + first.token_cu[-1]]),
        None,
    )
    for batch in (first, first, joined, second):
        objectives.next_byte(context, batch)
    assert core == teacher == [len(first.token_ids), len(second.token_ids)]
    chunks = len(first.token_ids) + len(second.token_ids)
    assert context.remembered.num_bytes == 2 * chunks * context.model.config.core_width * 4


def test_other_chunks_are_other_rows(contexts, batches):
    plain, context = contexts()
    batch = next(batches)
    h, routing = context.model.read(batch.ids, batch.cu_seqlens, batch.token_end)
    context.chunks(batch, h, routing)
    coarse = batch.token_end & ((torch.arange(len(batch.ids)) % 3 == 0) | (batch.ids == BOS))
    other = routing_of(coarse, batch.cu_seqlens)
    torch.testing.assert_close(context.chunks(batch, h, other), plain.chunks(batch, h, other), rtol=1e-5, atol=1e-5)


def test_held_out_measures_do_not_fill_it(contexts, batches):
    _, context = contexts()
    batch = next(batches)
    objectives.NEXT_BYTE.sums(context, batch)
    assert context.remembered.num_bytes == 0
    objectives.next_byte(context, batch)
    assert context.remembered.num_bytes > 0
