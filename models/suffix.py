"""Suffix features: what the teacher's vocabulary says of a text's last bytes, without a tokenizer.

To the encoder's state at each byte is added, through a linear map that begins as the identity, the teacher's embedding
of the longest vocabulary string that ends there (:func:`bytekernels.longest_suffix`). Where that string is the token
that the tokenizer would end on the byte, as it is at most of its ends, the encoder begins aligned.

The string may begin anywhere in the text before the byte (``suffix_scope="sequence"``), or not before the chunk that
ends on the byte (``"chunk"``). Then a chunk that is a token always has that token's embedding; but features depend on
where chunks end, so the core alone sees them: the router, which decides that, and the dechunk's residual do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bytekernels
from bytekernels import BOS, EOS, Routing, SortedVocabulary, SuffixState, SuffixTrie
from bytekernels.ragged import cu_seqlens_of, segment_ids
from models.config import ByteLMConfig


class Vocabulary(NamedTuple):
    """A teacher's vocabulary in bytes.

    Attributes:
        strings: the bytes of each id; empty for special tokens and gaps, which no text holds.
        bos_id, eos_id: what stands for the bytes BOS and EOS.
    """

    strings: Sequence[bytes]
    bos_id: int
    eos_id: int

    @property
    def num_bytes(self) -> int:
        """What a model's ``suffix_bytes`` must be to hold the strings."""
        return sum(map(len, self.strings))

    def by_prefix(self, entries: int) -> SortedVocabulary:
        """The vocabulary that byte marginals of a head of so many entries are taken over; EOS is the end of a text.

        Strings that hold a reserved byte are left out: no text does.
        """
        strings = [b"" if BOS in string or EOS in string else string for string in self.padded(entries)]
        strings[self.eos_id] = bytes([EOS])
        return SortedVocabulary(strings)

    def padded(self, entries: int) -> list[bytes]:
        """The strings of so many ids.

        Raises:
            ValueError: there are more.
        """
        if len(self.strings) > entries:
            raise ValueError(
                f"the tokenizer has {len(self.strings)} ids, but the model's vocabulary {entries}: resize the "
                "teacher's embeddings, or remove the tokens that were added to the tokenizer"
            )
        return [*self.strings, *(b"" for _ in range(entries - len(self.strings)))]


@dataclass
class ChunkSuffixState(SuffixState):
    """The bytes of each sequence's open chunk, and the token that they end with.

    Attributes:
        newest: int64 [S], -1 for none.
    """

    newest: Tensor


class SuffixFeatures(nn.Module):
    """Features of bytes, [T, d_core]. Strings and embeddings are buffers: saved with the model, and trained by nothing.

    Attributes:
        text: uint8 [suffix_bytes], the vocabulary's strings one after another.
        sizes: int32 [V], their lengths.
        ends: int64 [2], the ids that stand for BOS and EOS.
        table: [V, d_core], the teacher's input embeddings.
    """

    text: Tensor
    sizes: Tensor
    ends: Tensor
    table: Tensor

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.of_whole_chunks = config.suffix_scope == "chunk"
        entries, width = config.core_config().vocab_size, config.core_width
        self.register_buffer("text", torch.zeros(config.suffix_bytes, dtype=torch.uint8))
        self.register_buffer("sizes", torch.zeros(entries, dtype=torch.int32))
        self.register_buffer("ends", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.zeros(entries, width))
        self.map = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.map.weight)
        self._forget()
        self.register_load_state_dict_post_hook(lambda module, _: module._forget())

    def _forget(self) -> None:
        """Make what is derived from the strings anew when it is next asked for."""
        self._suffixes: SuffixTrie | None = None
        self._prefixes: SortedVocabulary | None = None

    @torch.no_grad()
    def fill(self, vocabulary: Vocabulary, embeddings: Tensor) -> None:
        """Take over a teacher's vocabulary and its embeddings, [V, d_core].

        Raises:
            ValueError: other sizes than the configuration has.
        """
        strings = vocabulary.padded(len(self.sizes))
        if vocabulary.num_bytes != len(self.text):
            raise ValueError(
                f"the vocabulary's strings have {vocabulary.num_bytes} bytes, but the configuration has suffix_bytes "
                f"{len(self.text)}: set suffix_bytes to the vocabulary's num_bytes"
            )
        self.text.copy_(torch.from_numpy(np.frombuffer(b"".join(strings), np.uint8).copy()))
        self.sizes.copy_(torch.tensor([len(string) for string in strings]))
        self.ends.copy_(torch.tensor([vocabulary.bos_id, vocabulary.eos_id]))
        self.table.copy_(embeddings)
        self._forget()

    @torch.no_grad()
    def fill_from(self, other: "SuffixFeatures") -> None:
        """Take over the vocabulary and the embeddings of another model's features."""
        for name, buffer in other.named_buffers():
            self.get_buffer(name).copy_(buffer)
        self._forget()

    def strings(self) -> list[bytes]:
        """The bytes of each id.

        Raises:
            ValueError: none have been filled in yet.
        """
        if self.text.is_meta:
            return [b"?"]  # of shapes alone, which no string decides
        if not self.sizes.any():
            raise ValueError("suffix features have no vocabulary yet: make the model by from_teacher, or fill them")
        whole, ends = self.text.cpu().numpy().tobytes(), self.sizes.cpu().cumsum(0).tolist()
        return [whole[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def suffixes(self) -> SuffixTrie:
        """The vocabulary read backwards, on the model's device."""
        if self._suffixes is None or self._suffixes.edges.device != self.text.device:
            self._suffixes = SuffixTrie(self.strings()).to(self.text.device)
        return self._suffixes

    @property
    def prefixes(self) -> SortedVocabulary:
        """The vocabulary by prefixes, on the model's device: what byte marginals are taken over."""
        if self._prefixes is None or self._prefixes.edges.device != self.text.device:
            strings = self.strings()
            bos, eos = self.ends.tolist()
            self._prefixes = Vocabulary(strings, bos, eos).by_prefix(len(self.sizes)).to(self.text.device)
        return self._prefixes

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None = None, states: list[Any] | None = None
    ) -> Tensor:
        """Of scope "sequence": uint8 [T], packed, to [T, d_core], or of ``rows`` (int32 [M]) alone to [M, d_core].

        To ``states`` the state is added from which :meth:`step` goes on.
        """
        if states is not None:
            states.append(SuffixState.after(ids, cu_seqlens, self.suffixes))
        return self._embedded(self._tokens(ids, cu_seqlens, rows))

    def step(self, ids: Tensor, state: SuffixState, active: Tensor | None = None) -> Tensor:
        """One more byte of each of S sequences, uint8 [S] to [S, d_core]; active ones' state is updated in place."""
        return self._embedded(self._next_tokens(ids, state, active))

    def of_chunks(self, ids: Tensor, cu_seqlens: Tensor, routing: Routing) -> Tensor:
        """Of scope "chunk": the features of M chunks, [M, d_core]."""
        # What follows a sequence's last chunk end joins the next one's BOS, whose feature nothing before it decides.
        segments = torch.cat([cu_seqlens[:1], routing.index + 1, cu_seqlens[-1:]])
        return self._embedded(self._tokens(ids, segments, routing.index))

    def open_chunks(self, ids: Tensor, cu_seqlens: Tensor, boundary: Tensor) -> ChunkSuffixState:
        """The state after packed sequences, none of them empty, of which every last byte's bit is still to come.

        Args:
            ids: uint8 [T].
            cu_seqlens: int32 [S+1].
            boundary: bool [T], where chunks end; at last bytes it is not read.
        """
        place, last = torch.arange(ids.shape[0], device=ids.device), cu_seqlens[1:].long() - 1
        ended = torch.where(boundary, place, -1)
        ended[last] = -1
        start = torch.maximum(ended.cummax(0).values[last] + 1, cu_seqlens[:-1].long())
        is_open = place >= start[segment_ids(cu_seqlens, ids.shape[0])]
        text, offsets = ids[is_open], cu_seqlens_of(last + 1 - start)
        kept = SuffixState.after(text, offsets, self.suffixes)
        return ChunkSuffixState(kept.recent, kept.counts, self._tokens(text, offsets, offsets[1:] - 1))

    def take(self, ids: Tensor, state: ChunkSuffixState, active: Tensor | None = None) -> None:
        """One more byte, uint8 [S], of the open chunk of each active sequence."""
        token = self._next_tokens(ids, state, active)
        state.newest.copy_(token if active is None else torch.where(active, token, state.newest))

    def close(self, state: ChunkSuffixState, closed: Tensor) -> Tensor:
        """The features of open chunks, [S, d_core]; those of ``closed`` (bool [S]) end, and new ones begin."""
        features = self._embedded(state.newest)
        state.counts.masked_fill_(closed, 0)
        return features

    def empty_state(self, sequences: int) -> SuffixState:
        kept = SuffixState.empty(sequences, self.suffixes)
        if not self.of_whole_chunks:
            return kept
        return ChunkSuffixState(kept.recent, kept.counts, torch.full_like(kept.counts, -1, dtype=torch.int64))

    def _tokens(self, ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None) -> Tensor:
        """The token whose embedding is each byte's feature, or each row's: int64, -1 for none."""
        found = bytekernels.longest_suffix(ids, cu_seqlens, self.suffixes, rows=rows)
        return self._with_ends(ids if rows is None else ids[rows], found)

    def _next_tokens(self, ids: Tensor, state: SuffixState, active: Tensor | None) -> Tensor:
        return self._with_ends(ids, bytekernels.longest_suffix_step(ids, state, self.suffixes, active=active))

    def _with_ends(self, ids: Tensor, found: Tensor) -> Tensor:
        bos, eos = self.ends
        return torch.where(ids == BOS, bos, torch.where(ids == EOS, eos, found.long()))

    def _embedded(self, tokens: Tensor) -> Tensor:
        return self.map(F.embedding(tokens.clamp(min=0), self.table) * (tokens >= 0)[:, None])
