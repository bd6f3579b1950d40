"""What a byte string is worth: log-likelihoods that pay for every bit.

The model defines ``P(bytes, bits) = prod_t P(byte_{t+1}, bit_{t+1} | bytes_{<=t}, bits_{<=t})``, a proper distribution
over byte strings cut into chunks. One path of bits bounds the probability of the bytes from below; summing a path's
halves without paying for its bits does not (the bits betray the next byte), and is not offered here.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import bytekernels
from bytekernels.ragged import IGNORE, segment_ids
from models.byte_lm import ByteLM
from models.core import run_packed


class Score(NamedTuple):
    """Natural-log likelihoods of S packed sequences, each given its first byte (BOS).

    Attributes:
        log_likelihood: float64 [S].
        bytes: int64 [S], bytes scored (all but the first).
    """

    log_likelihood: Tensor
    bytes: Tensor

    def bits_per_byte(self) -> float:
        """``-log2 P / bytes`` over all sequences; NaN where there are no bytes."""
        total = int(self.bytes.sum())
        return -float(self.log_likelihood.sum()) / math.log(2) / total if total else math.nan


@torch.no_grad()
def score(model: ByteLM, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None = None) -> Score:
    """Lower bound on ``log P(bytes)`` along one path of boundary bits.

    ``log P >= sum_t log P(byte_{t+1}, bit_{t+1} | ...)`` along the path, the last byte's bit summed out.

    Args:
        model: a byte-level model after stage 2.
        ids: uint8 [T], each sequence beginning with BOS.
        cu_seqlens: int32 [S+1].
        boundary: bool [T], the path; the router's own where it is None.

    Raises:
        ValueError: the model's dechunk weight sees the next byte (``lookahead``), so that it has no likelihood.
    """
    if model.config.dechunk == "lookahead":
        raise ValueError(
            "dechunk='lookahead' tells each byte about the one it predicts, so the model has no likelihood: "
            "train with dechunk='hold' or 'causal'"
        )
    output = model(ids, cu_seqlens, boundary)
    log_probs = path_log_probs(output.logits, ids, cu_seqlens, output.routing.boundary)
    return _sum_by_sequence(log_probs, cu_seqlens, ids.shape[0])


def path_log_probs(logits: Tensor, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor) -> Tensor:
    """Log-probability of each next (byte, bit) along a path: float64 [T], 0 at the last byte of each sequence.

    The bit of a sequence's last byte is summed out.
    """
    targets = bytekernels.next_byte_targets(ids, cu_seqlens, boundary)
    log_probs = F.log_softmax(logits.float(), dim=-1)
    chosen = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0].double()
    last = cu_seqlens[1:].long() - 2  # rows that predict a sequence's last byte
    last = last[last >= cu_seqlens[:-1]]
    byte = ids[last + 1].long()[:, None]
    halves = torch.cat([log_probs[last].gather(1, byte), log_probs[last].gather(1, byte + 256)], dim=1)
    chosen[last] = halves.double().logsumexp(dim=1)
    return torch.where(targets == IGNORE, 0.0, chosen)


@torch.no_grad()
def token_score(
    backbone: PreTrainedModel, head: Tensor, embeddings: Tensor, token_ids: Tensor, token_cu: Tensor, num_bytes: Tensor
) -> Score:
    """Log-likelihood of packed token sequences, each given its first token: the teacher's, or a stage-1 model's.

    Args:
        backbone: a transformer set to packed attention (:func:`models.core.use_packed`).
        head: [V, d_core], the token head's weight.
        embeddings: [M, d_core], what the backbone reads: token embeddings, or chunk embeddings at the tokens' ends.
        token_ids: int64 [M].
        token_cu: int32 [S+1].
        num_bytes: int64 [S], bytes of each sequence without its first token's.
    """
    hidden = run_packed(backbone, embeddings, token_cu)
    targets = next_token_targets(token_ids, token_cu)
    losses = [
        F.cross_entropy((rows @ head.T).float(), wanted, ignore_index=IGNORE, reduction="none")
        for rows, wanted in zip(hidden.split(2048), targets.split(2048), strict=True)
    ]
    score = _sum_by_sequence(-torch.cat(losses).double(), token_cu, token_ids.shape[0])
    return Score(score.log_likelihood, num_bytes)


def next_token_targets(token_ids: Tensor, token_cu: Tensor) -> Tensor:
    """The token after each token: int64 [M], IGNORE at each sequence's last."""
    targets = torch.roll(token_ids, -1)
    lengths = token_cu[1:] - token_cu[:-1]
    targets[token_cu[1:].long()[lengths > 0] - 1] = IGNORE
    return targets


def _sum_by_sequence(log_probs: Tensor, cu_seqlens: Tensor, total: int) -> Score:
    log_probs, cu_seqlens = log_probs.cpu(), cu_seqlens.cpu()  # where sums have a fixed order
    sums = log_probs.new_zeros(cu_seqlens.numel() - 1)
    sums.index_add_(0, segment_ids(cu_seqlens, total), log_probs)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return Score(sums, (lengths - 1).clamp(min=0))
