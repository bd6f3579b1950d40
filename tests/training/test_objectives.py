"""Objectives and measures against their definitions, and what each stage lets learn."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from bytekernels import next_byte_targets
from models import ByteLM, ByteLMConfig, score
from training import objectives
from training.context import Anchor, Context, Learner, Teacher
from training.data import Batches, held_out_batches
from training.noise import Noise
from training.objectives import measure
from training.parallel import Ranks
from training.recipe import StageRecipe
from training.stage_recipe import NOISE_KINDS
from training.stages import STAGES

ALONE = Ranks(0, 1, torch.device("cpu"))


def context(teacher, *, dechunk="hold", lookahead=True, draft_head=False, parts=None, **numbers) -> Context:
    torch.manual_seed(0)
    sizes = dict(
        width=16, encoder_layers=1, decoder_layers=1, state_size=8, head_dim=16, bridge_inner=32, router_inner=16
    )
    settings = dict(dechunk=dechunk, lookahead=lookahead, draft_head=draft_head, **(parts or {}))
    model = ByteLM.from_teacher(teacher, ByteLMConfig(**settings, **sizes))
    return Context(model, Teacher(teacher), StageRecipe(lr=1e-3, bytes=1, **numbers))


@pytest.fixture
def batch(corpus):
    return next(Batches(corpus, window=64, batch_bytes=600, seed=1))


def test_alignment_is_the_error_at_token_ends(teacher, batch):
    this = context(teacher)
    loss = objectives.alignment(this, batch)
    h = this.model.encoder(batch.ids, batch.cu_seqlens)[batch.token_end]
    expected = (h - teacher.get_input_embeddings()(batch.token_ids)).square().mean()
    torch.testing.assert_close(loss.total / loss.count, expected)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_distillation_is_the_kl_at_token_ends(teacher, batch, direction):
    this = context(teacher, alignment_weight=0.5, direction=direction)
    loss = objectives.distillation(this, batch)
    h = this.model.encoder(batch.ids, batch.cu_seqlens)[batch.token_end]
    student = this.model.token_head(this.model.core(h, batch.token_cu)).log_softmax(-1)
    teachers = []
    for start, stop in zip(batch.token_cu[:-1].tolist(), batch.token_cu[1:].tolist(), strict=True):
        alone = torch.tensor([0, stop - start], dtype=torch.int32)
        teachers.append(teacher(input_ids=batch.token_ids[None, start:stop], cu_chunks=alone).logits[0])
    target = torch.cat(teachers).log_softmax(-1)
    p, q = (student, target) if direction == "reverse" else (target, student)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(loss.parts["kl"] / loss.count, kl.detach(), atol=1e-5, rtol=1e-4)
    align = (h - teacher.get_input_embeddings()(batch.token_ids)).square().mean()
    torch.testing.assert_close(loss.total / loss.count, kl + 0.5 * align, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lookahead", [True, False])
def test_boundary_loss_counts_free_answers_only(teacher, batch, lookahead):
    this = context(teacher, lookahead=lookahead)
    prob = this.model.router(this.model.encoder(batch.ids, batch.cu_seqlens), batch.ids, batch.cu_seqlens).prob
    losses = []
    for s, e in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ends = batch.token_end[s:e].float()
        if lookahead:  # BOS is forced, and the last byte
            losses.append(F.binary_cross_entropy(prob[s + 1 : e - 1], ends[1:-1], reduction="none"))
        else:  # a chunk starts after each end
            losses.append(F.binary_cross_entropy(prob[s + 1 : e], ends[:-1], reduction="none"))
    loss = objectives.boundary(this, batch)
    torch.testing.assert_close(loss.total / loss.count, torch.cat(losses).mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dechunk", ["hold", "causal", "lookahead"])
def test_end_to_end_adds_its_parts(teacher, batch, dechunk):
    this = context(teacher, dechunk=dechunk, boundary_weight=0.7, distill_weight=0.3)
    output = this.model(batch.ids, batch.cu_seqlens)
    targets = next_byte_targets(batch.ids, batch.cu_seqlens, output.routing.boundary)
    loss = objectives.end_to_end(this, batch)
    cross_entropy = F.cross_entropy(output.logits, targets, ignore_index=-100)
    torch.testing.assert_close(loss.parts["cross_entropy"] / loss.count, cross_entropy.detach())
    boundary = objectives.boundary(this, batch)
    torch.testing.assert_close(
        loss.parts["boundary"] / loss.count, 0.7 * (boundary.total / boundary.count).detach(), atol=1e-5, rtol=1e-4
    )
    assert set(loss.parts) == {"cross_entropy", "boundary", "kl"} | ({"dechunk"} if dechunk == "causal" else set())
    torch.testing.assert_close(loss.total.detach(), sum(loss.parts.values()))


def losses_of_drafts(draft: torch.Tensor, batch) -> list[torch.Tensor]:
    """The draft head's cross-entropy of each byte that has one two places on, sequence by sequence."""
    losses = []
    for s, e in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        for t in range(s, e - 2):
            losses.append(-draft[t].log_softmax(-1)[int(batch.ids[t + 2])])
    return losses


def cut_short(batch, lengths: list[int]):
    """The batch's bytes cut into sequences of the given lengths."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return batch._replace(ids=batch.ids[: sum(lengths)], cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("lengths", [None, [5, 0, 1, 2, 3, 9], [2, 1]])
def test_draft_loss_is_the_cross_entropy_of_the_byte_after_the_next(teacher, batch, lengths):
    this = context(teacher, draft_head=True, draft_weight=0.4)
    batch = cut_short(batch, lengths) if lengths else batch
    losses = losses_of_drafts(this.model(batch.ids, batch.cu_seqlens).draft.detach(), batch)
    loss = objectives.next_byte(this, batch)
    expected = 0.4 * sum(losses, torch.zeros(())) / max(1, len(losses))
    torch.testing.assert_close(loss.parts["draft"] / loss.count, expected)
    torch.testing.assert_close(loss.total.detach(), sum(loss.parts.values()))
    without = objectives.next_byte(context(teacher), batch)
    assert set(loss.parts) == {*without.parts, "draft"}
    assert torch.equal(loss.parts["cross_entropy"], without.parts["cross_entropy"])


def test_a_sequence_is_not_drafted_from_another(teacher, batch):
    """The rows of a sequence's last two bytes, and the bytes of its neighbours, leave the head's gradient alone."""
    this = context(teacher, draft_head=True)
    pair = cut_short(batch, [12, 9])
    gradients = []
    for ids in (pair.ids, torch.cat([pair.ids[:12], (pair.ids[12:] + 77) % 254])):
        draft = torch.randn(21, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
        targets = next_byte_targets(ids, pair.cu_seqlens)
        F.cross_entropy(draft, objectives.draft_targets(targets), ignore_index=-100).backward()
        gradients.append(draft.grad)
    assert torch.equal(gradients[0][:12], gradients[1][:12]) and not torch.equal(gradients[0], gradients[1])
    reached = gradients[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 10 + [False] * 2 + [True] * 7 + [False] * 2
    objectives.next_byte(this, pair).total.backward()
    assert float(this.model.decoder.draft_head.weight.grad.abs().max()) > 0


def test_a_split_router_learns_without_the_encoder(teacher, batch):
    this = context(teacher, parts=dict(router="split"))
    beside = objectives.end_to_end(this, batch)
    del this.model.encoder
    loss = objectives.boundary(this, batch)
    torch.testing.assert_close((loss.total / loss.count).detach(), beside.parts["boundary"] / beside.count)


@pytest.mark.parametrize("parts", [{}, dict(encoder="attention"), dict(router="split")], ids=str)
@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_trains_its_own_parameters_only(teacher, batch, name, parts):
    this = context(teacher, distill_weight=0.1, draft_head=True, parts=parts)
    stage = STAGES[name]
    trained = dict(stage.freeze_others(this.model))
    loss = stage.objective(this, batch)
    loss.total.backward()
    got = {n for n, p in this.model.named_parameters() if p.grad is not None}
    assert got == set(trained)
    assert all(n.startswith(stage.trains) for n in trained)


def test_measures(teacher, corpus):
    this = context(teacher)
    batches = held_out_batches(corpus, window=64, batch_bytes=64, limit_bytes=1000)
    assert len(batches) > 1
    found = {}
    for stage in STAGES.values():
        for kind in stage.measures:
            found |= measure(kind, Learner(this), batches, ALONE)
    scores = [score(this.model, b.ids, b.cu_seqlens) for b in batches]
    bits = -sum(float(s.log_likelihood.sum()) for s in scores) / math.log(2) / sum(int(s.bytes.sum()) for s in scores)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert 0 <= found["f1"] <= 1 and -1 <= found["cosine"] <= 1 and found["kl"] > 0 and found["mse"] > 0


def test_a_draft_head_is_measured_beside_the_bits_per_byte_and_not_in_them(teacher, corpus):
    batches = held_out_batches(corpus, window=64, batch_bytes=64, limit_bytes=1000)
    without, found = (
        measure(objectives.NEXT_BYTE, Learner(context(teacher, draft_head=head)), batches, ALONE)
        for head in (False, True)
    )
    assert math.isnan(without["draft_accuracy"])
    assert {n: found[n] for n in ("cross_entropy", "bits_per_byte")} == {
        n: without[n] for n in ("cross_entropy", "bits_per_byte")
    }
    model, hits = context(teacher, draft_head=True).model, []
    for batch in batches:
        drafted = model(batch.ids, batch.cu_seqlens).draft.argmax(-1).tolist()
        for s, e in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            hits += [drafted[t] == int(batch.ids[t + 2]) for t in range(s, e - 2)]
    assert found["draft_accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_a_leaking_model_has_no_bits_per_byte(teacher, corpus):
    batches = held_out_batches(corpus, window=64, batch_bytes=64, limit_bytes=200)
    found = measure(objectives.NEXT_BYTE, Learner(context(teacher, dechunk="lookahead")), batches, ALONE)
    assert math.isnan(found["bits_per_byte"])
    assert found["cross_entropy"] > 0


def test_a_perfect_router_has_f1_one():
    assert objectives.BOUNDARY.finish([5, 5, 5]) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert objectives.BOUNDARY.finish([3, 6, 4]) == {"precision": 0.5, "recall": 0.75, "f1": 0.6}
    assert objectives.BOUNDARY.finish([0, 0, 4])["f1"] == 0.0


def test_a_narrow_teacher_keeps_its_rotary_frequencies(teacher, batch):
    wide = Teacher(teacher)(batch)
    narrow = Teacher(teacher)
    narrow.narrow(torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in narrow.parameters())
    assert all(buffer.dtype == torch.float32 for buffer in narrow.buffers())
    torch.testing.assert_close(narrow(batch).float(), wide, atol=0.05, rtol=0.05)


def test_joint_is_the_sum_of_stages_1_2_and_1_3(teacher, batch):
    this = context(teacher, alignment_weight=0.5, boundary_weight=0.7, direction="forward")
    loss, parts = objectives.joint(this, batch), objectives.distillation(this, batch).parts
    boundary = objectives.boundary(this, batch)
    torch.testing.assert_close(
        loss.total / loss.count,
        (sum(parts.values()) / len(batch.token_ids) + 0.7 * boundary.total / boundary.count).detach(),
        check_dtype=False,
    )
    assert set(loss.parts) == {"kl", "alignment", "boundary"}


@pytest.fixture
def noised(batch):
    return Noise(0.6, NOISE_KINDS, 0.2, seed=5).apply(batch)


@pytest.mark.parametrize("lookahead", [True, False])
def test_consistency_is_the_divergence_from_the_answers_on_clean_bytes(teacher, batch, noised, lookahead):
    this = context(teacher, lookahead=lookahead, consistency_weight=0.4)
    model, terms = this.model, []

    def ends(ids, cu_seqlens):
        """The probability that a chunk ends on each byte; None where the router is not asked."""
        prob = model.router(model.encoder(ids, cu_seqlens), ids, cu_seqlens).prob.tolist()
        answers = []
        for s, e in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            answers += [None, *prob[s + 1 : e - 1], None] if lookahead else [*prob[s + 1 : e], None]
        return answers

    clean, found = ends(batch.ids, batch.cu_seqlens), ends(noised.ids, noised.cu_seqlens)
    for mine, twin in zip(found, noised.twin.tolist(), strict=True):
        if twin >= 0 and mine is not None and clean[twin] is not None:
            p, q = clean[twin], mine
            terms.append(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    loss = objectives.boundary(this, noised)
    assert float(loss.parts["consistency"] / loss.count) == pytest.approx(0.4 * sum(terms) / len(noised.ids), rel=1e-3)
    assert sum(terms) > 0
    loss.total.backward()
    assert "consistency" in objectives.end_to_end(this, noised).parts
    assert "consistency" in objectives.joint(this, noised).parts
    assert "consistency" not in objectives.boundary(this, batch).parts  # held-out text is clean


def test_consistency_of_clean_sequences_is_nought(teacher, batch):
    this = context(teacher, consistency_weight=1.0)
    loss = objectives.boundary(this, Noise(0.0, NOISE_KINDS, 0.2, seed=5).apply(batch))
    assert float(loss.parts["consistency"]) == 0
    loss.total.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in this.model.parameters())


def test_tokens_of_noised_bytes_are_those_that_the_teacher_reads(teacher, noised):
    this = context(teacher, distill_weight=0.1)
    for stage in STAGES.values():
        assert math.isfinite(float(stage.objective(this, noised).total.detach())), stage.name
    h = this.model.encoder(noised.ids, noised.cu_seqlens)[noised.token_end]
    expected = (h - teacher.get_input_embeddings()(noised.token_ids)).square().mean()
    loss = objectives.alignment(this, noised)
    torch.testing.assert_close(loss.total / loss.count, expected)


def test_an_anchor_is_the_model_as_it_was(teacher, noised):
    this = context(teacher, anchor_weight=0.3)
    this = dataclasses.replace(this, anchor=Anchor(this.model))
    loss = objectives.end_to_end(this, noised)
    assert float(loss.parts["anchor"] / loss.count) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in this.model.core.parameters():
            parameter.mul_(1.1)
    loss = objectives.end_to_end(this, noised)
    h = this.model.encoder(noised.ids, noised.cu_seqlens)
    hidden = this.model.token_hidden(h, noised.ids, noised.token_end, noised.cu_seqlens)
    student, anchored = (this.model.token_head(x).log_softmax(-1) for x in (hidden, this.anchor(noised)))
    kl = (student.exp() * (student - anchored)).sum(-1).mean().detach()
    assert float(loss.parts["anchor"] / loss.count) == pytest.approx(0.3 * float(kl), rel=1e-3) and float(kl) > 0
    loss.total.backward()
    assert all(p.grad is None and not p.requires_grad for p in this.anchor.parameters())
    assert any(p.grad is not None for p in this.model.core.parameters())
