"""What each stage minimises, and what it is measured by on held-out text."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

import bytekernels
from bytekernels import AlignedBatch, Routing
from bytekernels.ragged import IGNORE
from models.byte_lm import ByteLMOutput
from models.core import run_packed
from models.likelihood import next_token_targets, path_log_probs
from training.context import Anchor, Context, Learner, Teacher
from training.marginals import marginal_means
from training.noise import NoisedBatch
from training.parallel import Ranks


class Loss(NamedTuple):
    """A mean loss times its ``count`` items, so that micro-batches and ranks of any size add up to one mean.

    A part that is a mean over other items (boundaries beside bytes, say) is weighted by the same count.

    Attributes:
        total: scalar, to be differentiated.
        count: scalar, what to divide by.
        parts: the summands, detached, for the log.
    """

    total: Tensor
    count: Tensor
    parts: dict[str, Tensor]


Objective = Callable[[Context, AlignedBatch], Loss]


def _loss(count: Tensor, **means: Tensor) -> Loss:
    """From means over ``count`` items: their sum."""
    total = torch.stack(list(means.values())).sum() * count
    return Loss(total, count, {name: (value * count).detach() for name, value in means.items()})


def boundary_targets(context: Context, batch: AlignedBatch) -> tuple[Tensor, Tensor]:
    """Where the tokenizer's chunks end (or, for H-Net's router, start), and which of the router's answers are free.

    Returns:
        bool [T] targets, and bool [T], False where the answer is forced: at BOS, and at the last byte of a sequence
        where the router looks ahead.
    """
    free = _free_answers(context, batch.cu_seqlens, batch.ids.shape[0])
    if context.model.config.lookahead:
        return batch.token_end, free
    starts = torch.roll(batch.token_end, 1)
    starts[_first_bytes(batch.cu_seqlens)] = True
    return starts, free


def _first_bytes(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens[:-1].long()[cu_seqlens[1:] > cu_seqlens[:-1]]


def _free_answers(context: Context, cu_seqlens: Tensor, total: int) -> Tensor:
    free = torch.ones(total, dtype=torch.bool, device=cu_seqlens.device)
    free[_first_bytes(cu_seqlens)] = False
    if context.model.config.lookahead:
        free[cu_seqlens[1:].long()[cu_seqlens[1:] > cu_seqlens[:-1]] - 1] = False
    return free


def next_token(context: Context, batch: AlignedBatch) -> Loss:
    """The teacher's own training: cross-entropy of the next token."""
    model = context.model
    hidden = run_packed(model.base_model, model.get_input_embeddings()(batch.token_ids), batch.token_cu)
    targets = next_token_targets(batch.token_ids, batch.token_cu)
    logits = model.get_output_embeddings()(hidden)
    loss = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE)
    return _loss((targets != IGNORE).sum(), cross_entropy=loss)


def alignment(context: Context, batch: AlignedBatch) -> Loss:
    """Stage 1.1: mean squared error between the state at a token's end and the teacher's embedding of the token."""
    ends = _token_ends(context, batch, bytekernels.routing_of(batch.token_end, batch.cu_seqlens))
    wanted = context.teacher(batch, hidden=False)
    return _loss(_count(batch.token_ids), mse=F.mse_loss(ends.float(), wanted.float()))


def _token_ends(context: Context, batch: AlignedBatch, routing: Routing) -> Tensor:
    return context.model.encoder.chunks(batch.ids, batch.cu_seqlens, routing)


def distillation(context: Context, batch: AlignedBatch) -> Loss:
    """Stage 1.2: KL to the teacher's next-token distribution at each token end, and the alignment kept beside it."""
    routing = bytekernels.routing_of(batch.token_end, batch.cu_seqlens)
    return _loss(
        _count(batch.token_ids), **_distillation_means(context, batch, _token_ends(context, batch, routing), routing)
    )


def _distillation_means(context: Context, batch: AlignedBatch, ends: Tensor, routing: Routing) -> dict[str, Tensor]:
    recipe = context.recipe
    hidden = context.model.core(ends, routing.cu_chunks)
    means = {"kl": _token_kl(context, context.teacher, batch, hidden, recipe.direction)}
    if recipe.alignment_weight:
        wanted = context.teacher(batch, hidden=False)
        means["alignment"] = recipe.alignment_weight * F.mse_loss(ends.float(), wanted.float())
    return means


def _token_kl(context: Context, guide: Teacher | Anchor, batch: AlignedBatch, hidden: Tensor, direction: str) -> Tensor:
    target = guide(batch)
    return bytekernels.linear_kl(hidden, context.model.token_head.weight, target, guide.head, direction=direction)


def boundary(context: Context, batch: AlignedBatch) -> Loss:
    """Stage 1.3: binary cross-entropy between the router's probability and the tokenizer's ends."""
    prob = context.model.route(batch.ids, batch.cu_seqlens).prob
    means = {"boundary": _boundary_loss(context, batch, prob), **_consistency_means(context, batch, prob)}
    return _loss(_count(batch.ids), **means)


def _boundary_loss(context: Context, batch: AlignedBatch, prob: Tensor) -> Tensor:
    targets, free = boundary_targets(context, batch)
    with torch.autocast(prob.device.type, enabled=False):
        losses = F.binary_cross_entropy(prob.float().clamp(1e-6, 1 - 1e-6), targets.float(), reduction="none")
    weights = free * torch.where(targets, context.recipe.end_weight, 1.0)
    return (losses * weights).sum() / weights.sum().clamp(min=1e-9)


def _consistency_means(context: Context, batch: AlignedBatch | NoisedBatch, prob: Tensor) -> dict[str, Tensor]:
    """The option that makes the router's answers on noised bytes agree with its own on the clean ones."""
    weight = context.recipe.consistency_weight
    if not (weight and isinstance(batch, NoisedBatch)):
        return {}
    return {"consistency": weight * _consistency_loss(context, batch, prob)}


def _consistency_loss(context: Context, batch: NoisedBatch, prob: Tensor) -> Tensor:
    """KL(clean || noised) of "does a chunk end here?" at noised bytes that stand for a clean one, over all bytes."""
    model, place = context.model, batch.twin.clamp(min=0)
    with torch.no_grad():
        clean = model.route(batch.clean_ids, batch.clean_cu).prob
    wanted, clean_free = (answers[place] for answers in _end_answers(context, clean, batch.clean_cu))
    found, free = _end_answers(context, prob, batch.cu_seqlens)
    kl = wanted * (wanted / found).log() + (1 - wanted) * ((1 - wanted) / (1 - found)).log()
    weights = (batch.twin >= 0) & free & clean_free
    return (kl * weights).sum() / prob.shape[0]  # by all bytes, so that the cut into micro-batches changes nothing


def _end_answers(context: Context, prob: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities that a chunk ends on each byte, float32 [T], and which are free. H-Net's router tells of starts."""
    free = _free_answers(context, cu_seqlens, prob.shape[0])
    prob = prob.float().clamp(1e-6, 1 - 1e-6)
    if context.model.config.lookahead:
        return prob, free
    return prob.roll(-1), free.roll(-1)


def joint(context: Context, batch: AlignedBatch) -> Loss:
    """Stages 1.1 to 1.3 at once: distillation with the alignment beside it, and the boundary loss."""
    model = context.model
    h = model.encoder(batch.ids, batch.cu_seqlens)
    by_token = bytekernels.routing_of(batch.token_end, batch.cu_seqlens)
    means = _distillation_means(
        context, batch, model.encoder.chunks(batch.ids, batch.cu_seqlens, by_token, h), by_token
    )
    prob = model.router(h, batch.ids, batch.cu_seqlens).prob
    means["boundary"] = context.recipe.boundary_weight * _boundary_loss(context, batch, prob)
    return _loss(_count(batch.token_ids), **means, **_consistency_means(context, batch, prob))


def next_byte(context: Context, batch: AlignedBatch) -> Loss:
    """Stage 2.1: cross-entropy of the next byte, jointly with whether one of the router's chunks ends on it.

    A draft head beside it learns the byte after the next. As an option chunks are the tokenizer's, and a share of the
    cross-entropy is against what the teacher says of the next byte.
    """
    _, count, means = _next_byte(context, batch)
    return _loss(count, **means)


def end_to_end(context: Context, batch: AlignedBatch) -> Loss:
    """Stage 2.2: stage 2.1's loss, the router's, and as options the distillation of stage 1.2, from the teacher or from
    the model that the stage began with.
    """
    model, recipe = context.model, context.recipe
    output, count, means = _next_byte(context, batch)
    if recipe.boundary_weight:
        means["boundary"] = recipe.boundary_weight * _boundary_loss(context, batch, output.routing.prob)
    means |= _consistency_means(context, batch, output.routing.prob)
    if recipe.distill_weight or recipe.anchor_weight:
        hidden = model.token_hidden(output.h, batch.ids, batch.token_end, batch.cu_seqlens)
    if recipe.distill_weight:
        means["kl"] = recipe.distill_weight * _token_kl(context, context.teacher, batch, hidden, "reverse")
    if recipe.anchor_weight:
        means["anchor"] = recipe.anchor_weight * _token_kl(context, context.anchor, batch, hidden, "reverse")
    return _loss(count, **means)


def _next_byte(context: Context, batch: AlignedBatch) -> tuple[ByteLMOutput, Tensor, dict[str, Tensor]]:
    model, by_token = context.model, context.recipe.byte_marginals > 0
    h, routing = model.read(batch.ids, batch.cu_seqlens, batch.token_end if by_token else None)
    output = model.predict(context.chunks(batch, h, routing), h, routing, batch.ids, batch.cu_seqlens)
    targets = bytekernels.next_byte_targets(batch.ids, batch.cu_seqlens, output.routing.boundary)
    if by_token:
        means = marginal_means(context, batch, output.logits, routing)
    else:
        means = {"cross_entropy": F.cross_entropy(output.logits.float(), targets, ignore_index=IGNORE)}
    if output.draft is not None:
        means["draft"] = context.recipe.draft_weight * _draft_loss(output.draft, targets)
    if model.config.dechunk == "causal":
        logits = model.dechunk.weight_logits(output.h)
        means["dechunk"] = F.binary_cross_entropy_with_logits(logits, output.routing.boundary.float())
    return output, (targets != IGNORE).sum(), means


def draft_targets(targets: Tensor) -> Tensor:
    """The byte after the next: int64 [T], IGNORE at the last two bytes of each sequence.

    Args:
        targets: int64 [T], as :func:`bytekernels.next_byte_targets` gives them, with boundaries or without.
    """
    following = torch.roll(targets, -1)
    return torch.where((targets == IGNORE) | (following == IGNORE), IGNORE, following % 256)


def _draft_loss(draft: Tensor, targets: Tensor) -> Tensor:
    wanted = draft_targets(targets)
    losses = F.cross_entropy(draft.float(), wanted, ignore_index=IGNORE, reduction="sum")
    return losses / (wanted != IGNORE).sum().clamp(min=1)


def _count(tensor: Tensor) -> Tensor:
    return torch.tensor(tensor.shape[0], device=tensor.device)


# ------------------------------------------------------------------------------------------------------ measures


class Measure(NamedTuple):
    """A stage's metric: sums over a held-out batch, and what they come to.

    Attributes:
        sums: of a context and a batch, a float64 vector that adds over batches and ranks.
        finish: the metrics of the added vectors.
    """

    sums: Callable[[Context, AlignedBatch], Tensor]
    finish: Callable[[Sequence[float]], dict[str, float]]


@torch.no_grad()
def measure(kind: Measure, learner: Learner, batches: Sequence[AlignedBatch], ranks: Ranks) -> dict[str, float]:
    """Read a metric over held-out batches, shared out over the ranks."""
    mode = learner.training
    learner.eval()
    # All ranks run as many forward passes; one that has nothing left to read reads its first batch again, for nothing.
    mine = batches[ranks.rank :: ranks.size]
    rounds = -(-len(batches) // ranks.size)
    parts = [
        learner(kind.sums, (mine[i] if i < len(mine) else batches[0]).to(ranks.device)) * (i < len(mine))
        for i in range(rounds)
    ]
    total = ranks.sum_(torch.stack(parts).sum(0))
    if isinstance(learner, FSDPModule):
        learner.reshard()  # what was gathered must not outlive a change of the weights
    learner.train(mode)
    return kind.finish(total.tolist())


def _alignment_sums(context: Context, batch: AlignedBatch) -> Tensor:
    ends = _token_ends(context, batch, bytekernels.routing_of(batch.token_end, batch.cu_seqlens)).double()
    wanted = context.teacher(batch, hidden=False).double()
    squared = (ends - wanted).square().mean(-1).sum()
    cosine = F.cosine_similarity(ends, wanted, dim=-1).sum()
    return torch.stack([squared, cosine, squared.new_tensor(len(ends))])


def _kl_sums(context: Context, batch: AlignedBatch) -> Tensor:
    loss = distillation(context, batch)
    return torch.stack([loss.parts["kl"].double(), loss.count.double()])


def _boundary_sums(context: Context, batch: AlignedBatch) -> Tensor:
    found = context.model.route(batch.ids, batch.cu_seqlens).boundary
    targets, free = boundary_targets(context, batch)
    found, targets = found[free], targets[free]
    return torch.stack([(found & targets).sum(), found.sum(), targets.sum()]).double()


def _finish_boundary(sums: Sequence[float]) -> dict[str, float]:
    hits, found, wanted = sums
    return {
        "precision": hits / found if found else 0.0,
        "recall": hits / wanted if wanted else 0.0,
        "f1": 2 * hits / (found + wanted) if found + wanted else 0.0,
    }


def _next_byte_sums(context: Context, batch: AlignedBatch) -> Tensor:
    output = context.model(batch.ids, batch.cu_seqlens)
    targets = bytekernels.next_byte_targets(batch.ids, batch.cu_seqlens, output.routing.boundary)
    losses = F.cross_entropy(output.logits.double(), targets, ignore_index=IGNORE, reduction="sum")
    if context.model.config.dechunk == "lookahead":  # what leaks the next byte has no likelihood
        log_prob = losses.new_tensor(math.nan)
    else:
        log_prob = path_log_probs(output.logits, batch.ids, batch.cu_seqlens, output.routing.boundary).sum()
    hits = drafted = losses.new_zeros(())
    if output.draft is not None:
        wanted = draft_targets(targets)
        hits, drafted = (output.draft.argmax(-1) == wanted).sum().double(), (wanted != IGNORE).sum().double()
    return torch.stack([losses, log_prob, (targets != IGNORE).sum().double(), hits, drafted])


def _finish_next_byte(sums: Sequence[float]) -> dict[str, float]:
    losses, log_prob, count, hits, drafted = sums
    return {
        "cross_entropy": losses / count,
        "bits_per_byte": -log_prob / count / math.log(2),
        "draft_accuracy": hits / drafted if drafted else math.nan,
    }


def _next_token_sums(context: Context, batch: AlignedBatch) -> Tensor:
    loss = next_token(context, batch)
    num_bytes = loss.count.new_tensor(batch.ids.shape[0] - (batch.cu_seqlens.shape[0] - 1))
    return torch.stack([loss.total.double(), loss.count.double(), num_bytes.double()])


ALIGNMENT = Measure(_alignment_sums, lambda s: {"mse": s[0] / s[2], "cosine": s[1] / s[2]})
KL = Measure(_kl_sums, lambda s: {"kl": s[0] / s[1]})
BOUNDARY = Measure(_boundary_sums, _finish_boundary)
NEXT_BYTE = Measure(_next_byte_sums, _finish_next_byte)
NEXT_TOKEN = Measure(
    _next_token_sums, lambda s: {"cross_entropy": s[0] / s[1], "bits_per_byte": s[0] / s[2] / math.log(2)}
)
