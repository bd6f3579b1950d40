"""The marginal head: what the token head says of the next byte is where the joint head begins.

The token head's distribution at a chunk's end is, exactly, one of (next byte, does a chunk end on it) at every byte of
the chunk that follows (:func:`bytekernels.byte_marginals`). The joint head's logits are added to its logarithm::

    logits_t = W x_t + log(P(byte, bit | chunks, bytes since the chunk began) + P(byte, other bit | ...) / 256 + 1e-6)

The second term is for chunks that are no tokens: a byte that the token head expects may end a chunk where no token
ends, or end none where its token does.

W begins at zero, so that a model that has learnt nothing predicts what its token head does, and learns what is left:
where its chunks are not the tokenizer's, and what bytes tell that chunks do not. No gradient goes through P.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import bytekernels
from bytekernels import SortedVocabulary

CHUNKS = 512  # whose distributions over the vocabulary are in memory at once
FLOOR = math.log(1e-6)
OTHER_END = math.log(1 / 256)
CLOSED = -2  # the node of a chunk that has just ended


@dataclass
class MarginalState:
    """What S sequences keep of their newest chunk.

    Attributes:
        token_logits: [S, V], of the token that follows it.
        node: int32 [S], of the bytes since: see :func:`bytekernels.token_prefix`.
    """

    token_logits: Tensor
    node: Tensor

    @classmethod
    def empty(cls, sequences: int, head: Tensor) -> "MarginalState":
        """Of sequences that have not begun; ``head`` is the token head's weight [V, d]."""
        node = torch.full((sequences,), -1, dtype=torch.int32, device=head.device)
        return cls(head.new_zeros(sequences, head.shape[0]), node)

    def close(self, token_logits: Tensor, closed: Tensor) -> None:
        """A chunk of each sequence in ``closed`` (bool [S]) has ended, on the byte that :meth:`read` is given next."""
        self.token_logits.copy_(torch.where(closed[:, None], token_logits, self.token_logits))
        self.node.masked_fill_(closed, CLOSED)

    def read(self, ids: Tensor, vocabulary: SortedVocabulary, active: Tensor | None = None) -> None:
        """One more byte of each active sequence, uint8 [S]."""
        node = torch.where(self.node == CLOSED, 0, vocabulary.child(self.node, ids))
        self.node.copy_(node if active is None else torch.where(active, node, self.node))

    def marginals(self, vocabulary: SortedVocabulary) -> Tensor:
        """Log-probabilities [S, 512] of what follows; of a sequence whose turn it is not they mean nothing."""
        slots = torch.arange(self.node.shape[0], dtype=torch.int32, device=self.node.device)
        return bytekernels.byte_marginals(self.token_logits, vocabulary, slots, self.node.clamp(min=-1))


@torch.no_grad()
def head_marginals(
    hidden: Tensor, head: Tensor, chunk_of: Tensor, prefix: Tensor, vocabulary: SortedVocabulary
) -> Tensor:
    """:func:`bytekernels.byte_marginals` of a token head's logits, of which 512 rows are in memory at once.

    Args:
        hidden: [M, d], the states at the chunks' ends.
        head: [V, d], the head's weight, taken in the dtype of the states.
        chunk_of: int32 [T], in ascending order.
        prefix: int32 [T], from :func:`bytekernels.token_prefix`.
        vocabulary: of the head, on its device.

    Returns:
        Log-probabilities [T, 512]; -inf throughout where there is no distribution.
    """
    firsts = torch.arange(0, hidden.shape[0], CHUNKS, dtype=torch.int32, device=chunk_of.device)
    rows = torch.searchsorted(chunk_of, firsts).tolist()  # waits for the device, once a batch
    bounds, weight = [0, *rows[1:], chunk_of.shape[0]], head.T.to(hidden.dtype)
    return torch.cat(
        [
            bytekernels.byte_marginals(
                hidden[number * CHUNKS : (number + 1) * CHUNKS] @ weight,
                vocabulary,
                chunk_of[first:last] - number * CHUNKS,
                prefix[first:last],
            )
            for number, (first, last) in enumerate(pairwise(bounds))
        ]
    )


def added(logits: Tensor, marginals: Tensor) -> Tensor:
    """The joint logits on top of log-probabilities [T, 512], in the latter's dtype."""
    likely = marginals.roll(256, dims=-1).add_(OTHER_END)
    torch.logaddexp(marginals, likely, out=likely)
    torch.logaddexp(likely, torch.full((), FLOOR, dtype=likely.dtype, device=likely.device), out=likely)
    return logits.to(marginals.dtype) + likely
