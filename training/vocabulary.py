"""Batches from the vocabulary itself: tokens of running text replaced by others, drawn by how frequent they are.

The target of stage 1.1 at a token's end is a function of the token alone, and running text shows most of a vocabulary
rarely or never. Here a share of the sequences has some of their tokens (real contexts) or all of them (random ones)
replaced by draws from the whole vocabulary.

A tokenizer would cut such text otherwise: drawn one after another, " the" and "re" end on the bytes of " there". So
that a byte is never given the wrong meaning, a token of such a sequence keeps its end only where it is the longest
vocabulary string that ends there (:func:`bytekernels.longest_suffix`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch

import bytekernels
from bytekernels import BOS, EOS, AlignedBatch, SuffixTrie
from models.suffix import Vocabulary
from training.alignment import TokenBytes
from training.noise import content_generator


def vocabulary_of(tokens: TokenBytes) -> Vocabulary:
    """What a text's bytes are matched against: all but special tokens.

    BOS and EOS are left out too where they are the unknown token as well, which a text may be cut into: "<|endoftext|>"
    is thirteen characters of text.
    """
    ends = (tokens.bos_id, tokens.eos_id)
    strings = [b"" if special or i in ends else tokens[i] for i, special in enumerate(tokens.special)]
    return Vocabulary(strings, tokens.bos_id, tokens.eos_id)


class Replaced(NamedTuple):
    """A sequence with tokens replaced.

    Attributes:
        ids: uint8 [C'], with BOS, and EOS where there is room for it.
        sizes: int64 [n'], bytes of each token.
        token_ids: int64 [n'].
    """

    ids: np.ndarray
    sizes: np.ndarray
    token_ids: np.ndarray


@dataclass(frozen=True)
class VocabularyDraw:
    """What is done to batches. The draws for a sequence depend on its own bytes and the seed, and on no other sequence.

    Attributes:
        tokens: the bytes of the vocabulary.
        weights: float64 [V], how often each token is drawn, up to one factor; 0 for those that never are.
        share: of the sequences that have tokens replaced, each by a draw of its own.
        rate: share of their tokens that are.
        seed: of the draws.
    """

    tokens: TokenBytes
    weights: np.ndarray
    share: float
    rate: float
    seed: int

    @classmethod
    def by_frequency(
        cls, tokens: TokenBytes, token_ids: np.ndarray, *, power: float, share: float, rate: float, seed: int
    ) -> Self:
        """Tokens drawn in proportion to ``(count + 1) ** power`` of their counts in a text (int32 [M], its tokens).

        Special tokens, and those with a byte that no text holds (0xFE, 0xFF), are never drawn.
        """
        counts = np.bincount(token_ids, minlength=len(tokens))
        barred = (tokens.flat == BOS) | (tokens.flat == EOS)
        within = np.concatenate([[0], np.cumsum(barred)])
        usable = (tokens.sizes > 0) & ~tokens.special
        usable[[tokens.bos_id, tokens.eos_id]] = False
        usable &= within[tokens.starts + tokens.sizes] == within[tokens.starts]
        return cls(tokens, np.where(usable, (counts + 1.0) ** power, 0.0), share, rate, seed)

    @cached_property
    def _cumulative(self) -> np.ndarray:
        sums = np.cumsum(self.weights)
        return sums / sums[-1]

    @cached_property
    def _trie(self) -> SuffixTrie:
        return SuffixTrie(vocabulary_of(self.tokens).strings)

    def apply(self, batch: AlignedBatch) -> AlignedBatch:
        """Replace tokens of a batch on the CPU. Sequences never grow, and those that are left alone keep every end."""
        ids, cu, token_cu = batch.ids.numpy(), batch.cu_seqlens.tolist(), batch.token_cu.tolist()
        ends = np.flatnonzero(batch.token_end.numpy())
        sizes = np.diff(ends, prepend=-1)
        parts, drawn = [], []
        for s, (start, first, stop) in enumerate(zip(cu, token_cu, token_cu[1:], strict=False)):
            clean = Replaced(ids[start : cu[s + 1]], sizes[first:stop], batch.token_ids.numpy()[first:stop])
            found = self.replaced(clean)
            parts.append(found or clean)
            drawn.append(np.full(len(parts[-1].sizes), found is not None))
        offsets = torch.tensor([0, *(len(part.ids) for part in parts)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        flat, widths, token_ids = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
        places = widths.cumsum(0) - 1
        kept = ~torch.from_numpy(np.concatenate(drawn)) | (flat[places] >= BOS)
        kept |= bytekernels.longest_suffix(flat, offsets, self._trie)[places] == self._smallest[token_ids]
        token_end = torch.zeros(len(flat), dtype=torch.bool)
        token_end[places[kept]] = True
        before = torch.cat([torch.zeros(1, dtype=torch.int64), token_end.cumsum(0)])
        targets = None if batch.targets is None else bytekernels.next_byte_targets(flat, offsets, token_end)
        return AlignedBatch(flat, offsets, token_end, token_ids[kept], before[offsets.long()].int(), targets)

    @cached_property
    def _smallest(self) -> torch.Tensor:
        """The smallest id with the string of each: int32 [V], what longest_suffix gives."""
        trie = self._trie
        return torch.where(trie.nodes >= 0, trie.ids[trie.nodes.long()], -1)

    def replaced(self, clean: Replaced) -> Replaced | None:
        """A sequence with tokens replaced, cut to its own length; None where it is to be left alone."""
        draw = content_generator(self.seed, clean.ids)
        if not draw.random() < self.share:
            return None
        count = len(clean.sizes)
        chosen = draw.random(count) < self.rate
        drawn = np.searchsorted(self._cumulative, draw.random(count), side="right")
        chosen &= clean.ids[np.cumsum(clean.sizes) - 1] < BOS
        token_ids = np.where(chosen, drawn, clean.token_ids)
        sizes = np.where(chosen, self.tokens.sizes[token_ids], clean.sizes).astype(np.int64)
        count = int(np.searchsorted(np.cumsum(sizes), len(clean.ids), side="right"))
        chosen, token_ids, sizes = chosen[:count], token_ids[:count], sizes[:count]
        source = np.concatenate([clean.ids, self.tokens.join(token_ids[chosen])])
        begins = (np.cumsum(clean.sizes) - clean.sizes)[:count]
        begins[chosen] = len(clean.ids) + np.cumsum(sizes[chosen]) - sizes[chosen]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return Replaced(source[np.repeat(begins, sizes) + within], sizes, token_ids)
