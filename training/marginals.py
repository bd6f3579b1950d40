"""What a token model says of the next byte: 512-way soft targets for stage 2, exact at every byte of a token."""

import torch
from torch import Tensor
from torch.nn import functional as F

import bytekernels
from bytekernels import AlignedBatch, Routing, SortedVocabulary
from bytekernels.ragged import IGNORE
from models.marginal_head import head_marginals
from training.context import Context


@torch.no_grad()
def byte_distributions(
    hidden: Tensor, head: Tensor, batch: AlignedBatch, routing: Routing, vocabulary: SortedVocabulary
) -> Tensor:
    """The teacher's distribution of (next byte, does its token end on it) after each byte, given the tokens so far.

    Args:
        hidden: [M, d_core], the teacher's states at the batch's tokens.
        head: [V, d_core], its token head's weight.
        batch: S sequences.
        routing: chunks that are the batch's tokens.
        vocabulary: of the teacher, on its device.

    Returns:
        float32 [T, 512], as in :func:`bytekernels.next_byte_targets`; zeros where the bytes since the token began are
        the beginning of no token.
    """
    prefix = bytekernels.token_prefix(batch.ids, batch.cu_seqlens, batch.token_end, vocabulary)
    return head_marginals(hidden, head, routing.chunk_of, prefix, vocabulary).float().exp()


def marginal_means(context: Context, batch: AlignedBatch, logits: Tensor, routing: Routing) -> dict[str, Tensor]:
    """Cross-entropy with a share ``recipe.byte_marginals`` of it against the teacher's distributions, in two parts.

    A byte for which the teacher has none counts by what follows it alone. Each part is over the count of all bytes
    that something follows.
    """
    hidden = context.teacher_states(batch)
    wanted = byte_distributions(hidden, context.teacher.head, batch, routing, context.vocabulary)
    targets = bytekernels.next_byte_targets(batch.ids, batch.cu_seqlens, routing.boundary)
    follows = targets != IGNORE
    log_probs = logits.float().log_softmax(-1)
    share = context.recipe.byte_marginals * (wanted.amax(-1) > 0)
    hard = F.nll_loss(log_probs, targets, ignore_index=IGNORE, reduction="none")
    soft = -(wanted * log_probs).sum(-1)
    count = follows.sum()
    return {
        "cross_entropy": ((1 - share) * hard).sum() / count,
        "marginals": (share * soft * follows).sum() / count,
    }
