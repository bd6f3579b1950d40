"""Suffix features: what the teacher's vocabulary says of a text's last bytes, without a tokenizer.

To the encoder's state at each byte is added, through a linear map that begins as the identity, the teacher's embedding
of the longest vocabulary string that ends there (:func:`bytekernels.longest_suffix`). Where that string is the token
that the tokenizer would end on the byte, as it is at most of its ends, the encoder begins aligned.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bytekernels
from bytekernels import BOS, EOS, SortedVocabulary, SuffixState, SuffixTrie
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
        """The vocabulary that byte marginals of a head of so many entries are taken over; EOS is the end of a text."""
        strings = [*self.strings, *(b"" for _ in range(entries - len(self.strings)))]
        strings[self.eos_id] = bytes([EOS])
        return SortedVocabulary(strings)


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

    @torch.no_grad()
    def fill(self, vocabulary: Vocabulary, embeddings: Tensor) -> None:
        """Take over a teacher's vocabulary and its embeddings, [V, d_core].

        Raises:
            ValueError: other sizes than the configuration has.
        """
        strings = [*vocabulary.strings, *(b"" for _ in range(len(self.sizes) - len(vocabulary.strings)))]
        if len(strings) != len(self.sizes) or vocabulary.num_bytes != len(self.text):
            raise ValueError(
                f"the vocabulary has {len(strings)} strings of {vocabulary.num_bytes} bytes, but the configuration "
                f"vocab_size {len(self.sizes)} and suffix_bytes {len(self.text)}: set suffix_bytes to its num_bytes"
            )
        self.text.copy_(torch.from_numpy(np.frombuffer(b"".join(strings), np.uint8).copy()))
        self.sizes.copy_(torch.tensor([len(string) for string in strings]))
        self.ends.copy_(torch.tensor([vocabulary.bos_id, vocabulary.eos_id]))
        self.table.copy_(embeddings)
        self._forget()

    def strings(self) -> list[bytes]:
        """The bytes of each id."""
        if self.text.is_meta:
            return [b"?"]  # of shapes alone, which no string decides
        whole, ends = self.text.cpu().numpy().tobytes(), self.sizes.cpu().cumsum(0).tolist()
        return [whole[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def suffixes(self) -> SuffixTrie:
        """The vocabulary read backwards, on the model's device."""
        if self._suffixes is None or self._suffixes.edges.device != self.text.device:
            self._suffixes = SuffixTrie(self.strings()).to(self.text.device)
        return self._suffixes

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None = None, states: list[Any] | None = None
    ) -> Tensor:
        """uint8 [T], packed, to [T, d_core], or of ``rows`` (int32 [M]) alone to [M, d_core].

        To ``states`` the state is added from which :meth:`step` goes on.
        """
        if states is not None:
            states.append(SuffixState.after(ids, cu_seqlens, self.suffixes))
        found = bytekernels.longest_suffix(ids, cu_seqlens, self.suffixes, rows=rows)
        return self._features(ids if rows is None else ids[rows], found)

    def step(self, ids: Tensor, state: SuffixState, active: Tensor | None = None) -> Tensor:
        """One more byte of each of S sequences, uint8 [S] to [S, d_core]; active ones' state is updated in place."""
        return self._features(ids, bytekernels.longest_suffix_step(ids, state, self.suffixes, active=active))

    def empty_state(self, sequences: int) -> SuffixState:
        return SuffixState.empty(sequences, self.suffixes)

    def _features(self, ids: Tensor, found: Tensor) -> Tensor:
        bos, eos = self.ends
        token = torch.where(ids == BOS, bos, torch.where(ids == EOS, eos, found.long()))
        embedded = F.embedding(token.clamp(min=0), self.table) * (token >= 0)[:, None]
        return self.map(embedded)
