"""Keys and values of the core's chunks while decoding: dense, though every sequence has a length of its own."""

from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

import bytekernels

KEYS = 64  # attention is over multiples of so many keys: then it rounds alike however long the longest sequence is
ODD = range(193, 384)  # but for these: MKL takes another kernel where 4 or more query heads share 256 or 320 keys


def width_for(chunks: int) -> int:
    """Keys to attend to where the longest sequence has so many chunks, the masked ones behind them among them."""
    return ODD.stop if chunks in ODD else -(-chunks // KEYS) * KEYS


class CacheStep:
    """One more chunk for each of S sequences: which of the cache's L rows each may see."""

    def __init__(self, lengths: Tensor, rows: int) -> None:
        self._behind = lengths[:, None] - torch.arange(rows, device=lengths.device)  # how far back a key lies
        self._masks: dict[int | None, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """bool [S, 1, 1, L]: keys of the same sequence, up to its new chunk, none further back than the window."""
        if window not in self._masks:
            seen = self._behind >= 0
            if window is not None:
                seen &= self._behind < window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]


class ChunkCache:
    """What the core remembers of S sequences, handed to transformers as its cache.

    Attributes:
        lengths: int64 [S], chunks of each sequence.
        longest: at least the greatest of them, known to the host.
        max_chunks: positions that the core has.
        keys, values: per layer [S, capacity, key heads, head_dim]; rows past a sequence's length mean nothing.
    """

    def __init__(self, sequences: int, layers: int, max_chunks: int, device: torch.device | str) -> None:
        self.lengths = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.longest = 0
        self.max_chunks = max_chunks
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self._slots = torch.arange(sequences, device=device)
        self._rows = self._places = self._slots  # what the next update writes to
        self._step: CacheStep | None = None

    def begin_prefill(self, cu_chunks: Tensor, total: int, longest: int) -> None:
        """The next update of each layer brings the packed keys of all sequences, [1, key heads, M, head_dim].

        Raises:
            ValueError: a sequence has more chunks than the core has positions.
        """
        if longest > self.max_chunks:
            self._refuse((cu_chunks[1:] - cu_chunks[:-1]).tolist())
        sequence, place = bytekernels.row_index(cu_chunks, total)
        self._rows, self._places, self._step = sequence.long(), place.long(), None
        self.lengths = (cu_chunks[1:] - cu_chunks[:-1]).long()
        self.longest = longest

    def begin_step(self, active: Tensor) -> CacheStep:
        """The next update of each layer brings a key of each sequence, [S, key heads, 1, head_dim].

        Only those of active sequences (bool [S]) are kept: the next step overwrites the others.

        Raises:
            ValueError: an active sequence has as many chunks as the core has positions.
        """
        if self.longest >= self.max_chunks and bool((active & (self.lengths >= self.max_chunks)).any()):
            self._refuse((self.lengths + active).tolist())
        self._rows, self._places = self._slots, self.lengths
        self._step = CacheStep(self.lengths, width_for(self.longest + 1))
        return self._step

    def end_step(self, active: Tensor) -> None:
        """Keep the new chunk of the active sequences."""
        self.lengths = self.lengths + active
        self.longest = min(self.longest + 1, self.max_chunks)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the layers: keep keys and values, and give those to attend to.

        What else a layer says differs between versions of transformers, and is of no use here.
        """
        pair = []
        for store, new in ((self.keys, key), (self.values, value)):
            kept = store[layer] = self._with_room(store[layer], new)
            if self._step is None:
                kept[self._rows, self._places] = new[0].transpose(0, 1)
                pair.append(new)
            else:
                kept[self._rows, self._places] = new[:, :, 0]
                pair.append(kept[:, : width_for(self.longest + 1)].transpose(1, 2))
        return pair[0], pair[1]

    def get_seq_length(self, layer: int = 0) -> int:
        """Asked for by transformers."""
        return self.longest

    def select(self, slots: Tensor) -> Self:
        """A copy of some sequences' rows, int64 [R]; they may repeat."""
        chosen = type(self)(slots.numel(), len(self.keys), self.max_chunks, self.lengths.device)
        chosen.lengths = self.lengths[slots]
        chosen.longest = int(chosen.lengths.max()) if slots.numel() else 0
        chosen.keys = [None if kept is None else kept[slots] for kept in self.keys]
        chosen.values = [None if kept is None else kept[slots] for kept in self.values]
        return chosen

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over lengths, keys and values (``cache.lengths``, ``cache.0.keys`` …) of as many sequences.

        Raises:
            ValueError: they do not fit each other or the core.
        """
        device, lengths = self.lengths.device, tensors["cache.lengths"]
        longest = int(lengths.max()) if lengths.numel() else 0
        for name, store in (("keys", self.keys), ("values", self.values)):
            saved = [tensors.get(f"cache.{layer}.{name}") for layer in range(len(store))]
            if longest and any(kept is None or kept.shape[1] < longest for kept in saved):
                raise ValueError(f"the saved state lacks {name} of {len(store)} layers and {longest} chunks")
            store[:] = [None if kept is None else kept.to(device, copy=True) for kept in saved]
        self.lengths, self.longest = lengths.to(device, copy=True), longest

    def _with_room(self, kept: Tensor | None, new: Tensor) -> Tensor:
        """The store with a row to spare past the longest and all that is attended to, each time twice as long."""
        needed = width_for(self.longest + 1)
        if kept is not None and kept.shape[1] >= needed:
            return kept
        grown = new.new_zeros(self.lengths.numel(), width_for(2 * needed), new.shape[1], new.shape[3])
        if kept is not None:
            grown[:, : kept.shape[1]] = kept
        return grown

    def _refuse(self, chunks: list[int]) -> NoReturn:
        wrong = next(sequence for sequence, size in enumerate(chunks) if size > self.max_chunks)
        raise ValueError(
            f"sequence {wrong} of the batch, of {chunks[wrong]} chunks, is longer than the core's {self.max_chunks} "
            "positions (max_position_embeddings): shorten the text"
        )
