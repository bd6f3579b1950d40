"""Stage 2's soft targets: they multiply to the teacher's own probabilities, and are what the loss says."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from bytekernels import BOS, EOS, next_byte_targets, routing_of
from models import ByteLM, ByteLMConfig, marginal_head
from models.core import run_packed
from training import objectives
from training.alignment import TokenBytes
from training.context import Context, Teacher
from training.data import Batches
from training.marginals import byte_distributions
from training.stage_recipe import StageRecipe
from training.stages import STAGES
from training.vocabulary import vocabulary_of


@pytest.fixture
def batch(corpus):
    return next(Batches(corpus, window=64, batch_bytes=600, seed=1))


@pytest.fixture
def vocabulary(tokenizer, teacher):
    return vocabulary_of(TokenBytes(tokenizer)).by_prefix(teacher.get_output_embeddings().weight.shape[0])


def context(teacher, vocabulary, **numbers) -> Context:
    torch.manual_seed(0)
    sizes = dict(width=16, encoder_layers=1, decoder_layers=1, state_size=8, head_dim=16, bridge_inner=32)
    model = ByteLM.from_teacher(teacher, ByteLMConfig(router_inner=16, **sizes))
    recipe = StageRecipe(lr=1e-3, bytes=1, **numbers)
    return Context(model, Teacher(teacher), recipe, vocabulary=vocabulary)


@pytest.mark.parametrize("chunks", [3, 512])
def test_along_a_token_they_multiply_to_its_probability(teacher, vocabulary, batch, monkeypatch, chunks):
    monkeypatch.setattr(marginal_head, "CHUNKS", chunks)
    routing = routing_of(batch.token_end, batch.cu_seqlens)
    guide = Teacher(teacher)
    found = byte_distributions(guide(batch), guide.head, batch, routing, vocabulary)
    assert found.shape == (len(batch.ids), 512) and found.dtype == torch.float32
    sums = found.sum(-1)
    assert ((sums - 1).abs() < 1e-5).logical_or(sums == 0).all() and (sums > 0).float().mean() > 0.9
    embeddings = teacher.get_input_embeddings()(batch.token_ids)
    logits = run_packed(teacher.base_model, embeddings, batch.token_cu) @ teacher.get_output_embeddings().weight.T
    in_text = torch.tensor([bool(vocabulary.nodes[i] >= 0) for i in range(logits.shape[1])])
    log_p = logits.masked_fill(~in_text, -torch.inf).log_softmax(-1)
    ends = batch.token_end.nonzero().flatten().tolist()
    starts = {int(start) for start in batch.cu_seqlens}
    checked = 0
    for m, (start, end) in enumerate(pairwise(ends)):
        if end in starts or batch.ids[end] == EOS:  # another sequence's BOS
            continue
        steps = [found[t, int(batch.ids[t + 1]) + 256 * (t + 1 == end)] for t in range(start, end)]
        expected = log_p[m, batch.token_ids[m + 1]]
        torch.testing.assert_close(torch.stack(steps).log().sum(), expected, atol=1e-5, rtol=1e-5)
        checked += 1
    assert checked > 50


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_loss_is_a_cross_entropy_against_them(teacher, vocabulary, batch, share):
    this = context(teacher, vocabulary, byte_marginals=share)
    logits = this.model(batch.ids, batch.cu_seqlens, batch.token_end).logits.detach()
    routing = routing_of(batch.token_end, batch.cu_seqlens)
    wanted = byte_distributions(this.teacher(batch), this.teacher.head, batch, routing, vocabulary)
    targets = next_byte_targets(batch.ids, batch.cu_seqlens, batch.token_end)
    hard_sum = soft_sum = 0.0
    for row, target in enumerate(targets.tolist()):
        if target < 0:
            continue
        log_q, known = logits[row].log_softmax(-1), bool(wanted[row].sum() > 0)
        one_hot = F.one_hot(torch.tensor(target), 512)
        hard_sum -= (1 - share * known) * (one_hot * log_q).sum().item()
        soft_sum -= share * known * (wanted[row] * log_q).sum().item()
    loss, count = objectives.next_byte(this, batch), int((targets >= 0).sum())
    assert int(loss.count) == count and set(loss.parts) == {"cross_entropy", "marginals"}
    assert float(loss.parts["cross_entropy"]) == pytest.approx(hard_sum, rel=1e-4, abs=1e-4)
    assert float(loss.parts["marginals"]) == pytest.approx(soft_sum, rel=1e-4)
    assert loss.total.item() == pytest.approx(hard_sum + soft_sum, rel=1e-4)


def test_a_byte_that_begins_no_token_counts_by_what_follows(teacher, vocabulary, batch):
    this = context(teacher, vocabulary, byte_marginals=1.0)
    ends = batch.token_end & (batch.ids == BOS)  # one long chunk: soon its bytes are the beginning of no token
    strange = batch._replace(token_end=ends, token_ids=batch.token_ids[:1].expand(int(ends.sum())),
                             token_cu=torch.arange(len(batch.cu_seqlens), dtype=torch.int32))  # fmt: skip
    routing = routing_of(ends, batch.cu_seqlens)
    wanted = byte_distributions(this.teacher(strange), this.teacher.head, strange, routing, vocabulary)
    unknown = wanted.sum(-1) == 0
    assert unknown.float().mean() > 0.5
    targets = next_byte_targets(batch.ids, batch.cu_seqlens, ends)
    rows = unknown & (targets >= 0)
    logits = this.model(batch.ids, batch.cu_seqlens, ends).logits
    expected = F.cross_entropy(logits[rows], targets[rows], reduction="sum")
    torch.testing.assert_close(objectives.next_byte(this, strange).parts["cross_entropy"], expected.detach())


@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_they_are_learnt(teacher, vocabulary, batch, name):
    this = context(teacher, vocabulary, byte_marginals=1.0)
    parameters = [parameter for _, parameter in STAGES[name].freeze_others(this.model)]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(30):
        loss = STAGES[name].objective(this, batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
        losses.append(float(loss.parts["marginals"] / loss.count))
    assert losses[-1] < 0.7 * losses[0]
