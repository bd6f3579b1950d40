"""What a run's models make of its held-out rows: log-likelihoods, of the same rows for all."""

from collections.abc import Callable

import torch

from bytekernels import BOS, AlignedBatch
from models import ByteLM, Score, score, token_score
from models.likelihood import path_log_probs
from training.run import Run


def teacher_score(run: Run) -> Score:
    """The teacher's log-likelihood of the held-out rows, along its own tokenization."""
    teacher = run.placed_teacher

    def of_batch(batch: AlignedBatch) -> Score:
        num_bytes = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long() - 1
        hidden = teacher(batch)
        return token_score(hidden, teacher.head, batch.token_ids, batch.token_cu, num_bytes)

    return _score(run, of_batch)


def student_score(run: Run, model: ByteLM) -> Score | None:
    """The byte-level model's log-likelihood (its honest bound) of the same rows; None where it has none."""
    if model.config.dechunk == "lookahead":
        return None
    return _score(run, lambda batch: score(model, batch.ids, batch.cu_seqlens))


def leaking_score(run: Run, model: ByteLM) -> Score | None:
    """What a model whose dechunk weight sees the next byte makes of the same rows; None for any other model.

    The text is fed in, and each byte leaks into its own prediction, so this is no likelihood of anything, and not
    to be held against bits per byte. It shows that such a model has learnt, and how much it leaks.
    """
    if model.config.dechunk != "lookahead":
        return None

    def of_batch(batch: AlignedBatch) -> Score:
        output = model(batch.ids, batch.cu_seqlens)
        log_probs = path_log_probs(output.logits, batch.ids, batch.cu_seqlens, output.routing.boundary)
        return Score(log_probs.sum()[None], (batch.ids != BOS).sum()[None])

    return _score(run, of_batch)


@torch.no_grad()
def _score(run: Run, of_batch: Callable[[AlignedBatch], Score]) -> Score:
    """Scores of all rows, on every rank; the ranks share out the batches and run as many forward passes each."""
    batches, size = run.score_batches, run.ranks.size
    mine: list[Score] = []
    with run.precision():
        for first in range(0, len(batches), size):
            number = first + run.ranks.rank
            scored = of_batch(batches[number if number < len(batches) else first].to(run.ranks.device))
            if number < len(batches):
                mine.append(Score(*(part.cpu() for part in scored)))
    scores = [scored for one in run.ranks.gather(mine) for scored in one]
    return Score(*(torch.cat(parts) for parts in zip(*scores, strict=True)))
