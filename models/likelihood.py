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

from bytekernels import BOS
from bytekernels.ragged import IGNORE, lengths_of, segment_ids
from models.byte_lm import ByteLM

BLOCK_ROWS = 2048  # tokens whose logits are made at once


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
def score(
    model: ByteLM, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor | None = None, context: Tensor | None = None
) -> Score:
    """Lower bound on ``log P(bytes)`` along one path of boundary bits.

    ``log P >= sum_t log P(byte_{t+1}, bit_{t+1} | ...)`` along the path, the last byte's bit summed out. With a context
    of c bytes (:func:`path_log_probs`) it is the bound on ``log P(bytes after the context | context)``.

    Args:
        model: a byte-level model after stage 2.
        ids: uint8 [T], each sequence beginning with BOS.
        cu_seqlens: int32 [S+1].
        boundary: bool [T], the path; the router's own where it is None.
        context: int64 [S], how many bytes after BOS are given; none where it is None.

    Raises:
        ValueError: the model's dechunk weight sees the next byte (``lookahead``), so that it has no likelihood, or a
            context leaves no byte to score.
    """
    refuse_leaks(model)
    if context is not None:
        check_context(context, cu_seqlens)
    output = model(ids, cu_seqlens, boundary, context)
    log_probs = path_log_probs(output.logits, ids, cu_seqlens, output.routing.boundary, context)
    found = _sum_by_sequence(log_probs, cu_seqlens, ids.shape[0])
    return found if context is None else Score(found.log_likelihood, found.bytes - context.cpu())


def refuse_leaks(model: ByteLM) -> None:
    """Refuse a model that has no likelihood.

    Raises:
        ValueError: the model's dechunk weight sees the next byte (``lookahead``).
    """
    model.dechunk.check_causal()


def check_context(context: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse contexts, int64 [S], that are no part of their sequences or all of them."""
    room = (lengths_of(cu_seqlens).long() - 2).clamp(min=0)
    wrong = ((context < 0) | (context > room.to(context.device))).nonzero()
    if len(wrong):
        s = int(wrong[0])
        raise ValueError(
            f"context {int(context[s])} of sequence {s} must be in 0 ... {int(room[s])}: BOS is not counted, "
            "and a byte must be left to score"
        )


class PathRows(NamedTuple):
    """What T rows of logits say along a path; row t is about byte t+1 and its bit.

    Attributes:
        log_probs: float64 [T], each row's share of the log-likelihood (:func:`path_log_probs`).
        flips: float64 [T], ``log P(byte, other bit) - log P(byte, bit)``; -inf where the bit is given or summed out.
        favourites: int64 [T], the likeliest byte + 256 x bit, BOS left out. At the context's last byte, which is
            given, it is that byte with its likelier bit.
    """

    log_probs: Tensor
    flips: Tensor
    favourites: Tensor


def path_rows(logits: Tensor, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, context: Tensor) -> PathRows:
    """All that a search over paths reads of a forward pass; arguments as in :func:`path_log_probs`."""
    halves = _halves(logits, ids)
    position, length, given = _places(cu_seqlens, ids.shape[0], context)
    bits = boundary.roll(-1)
    flips = torch.where(bits, halves[:, 0] - halves[:, 1], halves[:, 1] - halves[:, 0])
    free = (position >= given - 1) & (position <= length - 3)
    allowed = logits.clone()
    allowed[:, [BOS, BOS + 256]] = -torch.inf
    likelier = ids.roll(-1).long() + 256 * (halves[:, 1] > halves[:, 0])
    return PathRows(
        _along_path(halves, cu_seqlens, boundary, context),
        torch.where(free, flips, -torch.inf),
        torch.where(position == given - 1, likelier, allowed.argmax(-1)),
    )


def path_log_probs(
    logits: Tensor, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor, context: Tensor | None = None
) -> Tensor:
    """Log-probability of each next (byte, bit) along a path, in natural logs: float64 [T].

    Row t holds ``log P(byte_{t+1}, bit_{t+1} | bytes_{<=t}, bits_{<=t})``. The bit of a sequence's last byte is summed
    out, and the last row is 0. Of a context of c bytes only the last bit is scored: rows before c-1 are 0, and row
    c-1 is ``log P(bit_c | byte_c, ...) = log P(byte_c, bit_c | ...) - log sum_b P(byte_c, b | ...)``.

    Args:
        logits: [T, 512].
        ids: uint8 [T].
        cu_seqlens: int32 [S+1].
        boundary: bool [T], the path.
        context: int64 [S], bytes after BOS that are given; none where it is None.
    """
    return _along_path(_halves(logits, ids), cu_seqlens, boundary, context)


def _halves(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of each next byte without and with a chunk's end: float64 [T, 2].

    A sequence's last row, which predicts nothing, reads some other byte.
    """
    byte = ids.roll(-1).long()[:, None]
    return F.log_softmax(logits.float(), dim=-1).gather(1, torch.cat([byte, byte + 256], dim=1)).double()


def _along_path(halves: Tensor, cu_seqlens: Tensor, boundary: Tensor, context: Tensor | None) -> Tensor:
    position, length, given = _places(cu_seqlens, halves.shape[0], context)
    pair = halves.gather(1, boundary.roll(-1).long()[:, None])[:, 0]
    byte = halves.logsumexp(dim=1)
    log_probs = torch.where(position == length - 2, byte, pair)
    log_probs = torch.where(position == given - 1, log_probs - byte, log_probs)
    return torch.where((position < given - 1) | (position == length - 1), 0.0, log_probs)


def _places(cu_seqlens: Tensor, total: int, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """For each row its position, its sequence's length and its sequence's context: int64 [T]."""
    segment = segment_ids(cu_seqlens, total)
    position = torch.arange(total, device=cu_seqlens.device) - cu_seqlens.long()[segment]
    given = torch.zeros_like(position) if context is None else context[segment]
    return position, lengths_of(cu_seqlens).long()[segment], given


@torch.no_grad()
def token_score(hidden: Tensor, head: Tensor, token_ids: Tensor, token_cu: Tensor, num_bytes: Tensor) -> Score:
    """Log-likelihood of packed token sequences, each given its first token: the teacher's, or a stage-1 model's.

    Args:
        hidden: [M, d_core], a transformer's last states at the tokens (:func:`models.core.run_packed`).
        head: [V, d_core], the token head's weight.
        token_ids: int64 [M].
        token_cu: int32 [S+1].
        num_bytes: int64 [S], bytes of each sequence without its first token's.
    """
    log_probs, _ = token_log_probs(hidden, head, token_ids, token_cu)
    return Score(_sum_by_sequence(log_probs, token_cu, token_ids.shape[0]).log_likelihood, num_bytes)


def token_log_probs(hidden: Tensor, head: Tensor, token_ids: Tensor, token_cu: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each next token, and whether it is the likeliest.

    Args:
        hidden: [M, d_core], the states that the head reads.
        head: [V, d_core].
        token_ids: int64 [M].
        token_cu: int32 [S+1].

    Returns:
        float64 [M], 0 at each sequence's last token, and bool [M], True there.
    """
    targets = next_token_targets(token_ids, token_cu)
    blocks = max(1, math.ceil(len(hidden) / BLOCK_ROWS))  # of nearly equal size: the logits are the largest tensor
    parts = []
    for rows, wanted in zip(hidden.tensor_split(blocks), targets.tensor_split(blocks), strict=True):
        logits = (rows @ head.T).float()
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none")
        parts.append((-loss.double(), (logits.argmax(-1) == wanted) | (wanted == IGNORE)))
    log_probs, greedy = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_probs, greedy


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
