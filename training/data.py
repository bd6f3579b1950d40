"""Packed, document-aware batches of a prepared corpus.

Documents are cut into windows at token ends; a batch is a packed row of windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from bytekernels import AlignedBatch, align_pack
from training.alignment import TokenBytes
from training.corpus import Corpus, Split
from training.errors import UserError

CUT_TOKENS = 2**24
WINDOWS_DRAWN = 2**62  # a seed's purpose; its epochs are the small numbers

# ------------------------------------------------------------------------------------------------------ windows


@dataclass(frozen=True)
class Windows:
    """W pieces of documents, in the order of the text, each beginning and ending on a token end.

    first_byte, first_token: int64 [W], positions in the split; bytes, tokens: int64 [W], sizes; last: bool [W], the
    piece ends its document. skipped_documents: how many documents hold a token longer than a window.
    """

    first_byte: np.ndarray
    bytes: np.ndarray
    first_token: np.ndarray
    tokens: np.ndarray
    last: np.ndarray
    skipped_documents: int

    def __len__(self) -> int:
        return len(self.bytes)

    def draw(self, limit_bytes: int, *key: int) -> np.ndarray:
        """Windows drawn by a key that hold ``limit_bytes`` together or less, at least one of them: int64 [n]."""
        drawn = np.random.Generator(np.random.Philox(key)).permutation(len(self))
        return drawn[: max(1, int(np.searchsorted(np.cumsum(self.bytes[drawn]), limit_bytes, "right")))]

    def sample(self, limit_bytes: int, *key: int) -> "Windows":
        """As :meth:`draw`, in the order of the text."""
        chosen = np.sort(self.draw(limit_bytes, *key))
        columns = {f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name != "skipped_documents"}
        return Windows(**columns, skipped_documents=self.skipped_documents)


def cut_windows(split: Split, max_bytes: int) -> Windows:
    """Cuts every document, from its start, into windows of as many whole tokens as `max_bytes` holds."""
    pieces: list[np.ndarray] = []  # each [5, n]
    skipped_documents = 0
    first_document = 0
    while first_document < split.documents:
        token_limit = split.token_offsets[first_document] + CUT_TOKENS
        last_document = max(first_document + 1, int(np.searchsorted(split.token_offsets, token_limit, "right")) - 1)
        found, skipped = _cut_documents(split, first_document, last_document, max_bytes)
        pieces += found
        skipped_documents += skipped
        first_document = last_document
    cut = np.concatenate(pieces, axis=1) if pieces else np.empty((5, 0), dtype=np.int64)
    first_byte, n_bytes, first_token, n_tokens, last = cut[:, np.argsort(cut[0])]
    return Windows(first_byte, n_bytes, first_token, n_tokens, last.astype(bool), skipped_documents)


def _cut_documents(split: Split, first: int, stop: int, max_bytes: int) -> tuple[list[np.ndarray], int]:
    """Windows of the documents first … stop − 1, the k-th of every document at once."""
    token_offsets = split.token_offsets[first : stop + 1]
    base_token, base_byte = token_offsets[0], split.doc_offsets[first]
    lengths = split.token_lengths[base_token : token_offsets[-1]]
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # bytes before each token, and in all
    begin, end = token_offsets[:-1] - base_token, token_offsets[1:] - base_token

    too_long = np.flatnonzero(lengths > max_bytes)
    usable = np.ones(stop - first, dtype=bool)
    usable[np.searchsorted(end, too_long, "right")] = False
    skipped = int(stop - first - usable.sum())
    usable &= end > begin
    begin, end = begin[usable], end[usable]

    pieces = []
    while len(begin):
        cut = np.minimum(np.searchsorted(ends, ends[begin] + max_bytes, "right") - 1, end)
        last = cut == end
        pieces.append(
            np.stack([ends[begin] + base_byte, ends[cut] - ends[begin], begin + base_token, cut - begin, last])
        )
        begin, end = cut[~last], end[~last]
    return pieces, skipped


# ------------------------------------------------------------------------------------------------------ batches


def build_batch(
    tokens: Corpus | TokenBytes,
    split: Split,
    windows: Windows,
    chosen: np.ndarray,
    eos: bool,
    pin: bool = False,
    threads: int | None = None,
) -> AlignedBatch:
    """The chosen windows as a batch without targets: those depend on the router's boundaries.

    ``tokens`` knows the ids that stand for BOS and EOS.
    """
    columns = (windows.first_byte, windows.bytes, windows.first_token, windows.tokens)
    return align_pack(
        split.text,
        split.token_ids,
        split.token_lengths,
        np.stack([column[chosen] for column in columns], axis=1),
        bos_id=tokens.bos_id,
        eos_id=tokens.eos_id,
        ends=windows.last[chosen] & eos,
        targets=False,
        pin=pin,
        threads=threads,
    )


class Order:
    """The order in which windows are visited: all of them, packed from the front.

    Args:
        sizes: int64 [W], bytes of each window in a batch.
        order: a permutation of the windows, int64 [W].
    """

    def __init__(self, sizes: np.ndarray, order: np.ndarray) -> None:
        self._order = order
        self._ends = np.concatenate([[0], np.cumsum(sizes[order])])

    @classmethod
    def shuffled(cls, sizes: np.ndarray, *key: int) -> "Order":
        """The order of a key: the same on every machine."""
        return cls(sizes, np.random.Generator(np.random.Philox(key)).permutation(len(sizes)))

    def __len__(self) -> int:
        return len(self._order)

    def bytes_from(self, position: int) -> int:
        """Bytes of the windows from `position` on."""
        return int(self._ends[-1] - self._ends[position])

    def take(self, position: int, batch_bytes: int) -> tuple[np.ndarray, int]:
        """As many windows from `position` on as fit in `batch_bytes`, and the position after them."""
        stop = int(np.searchsorted(self._ends, self._ends[position] + batch_bytes, "right")) - 1
        return self._order[position:stop], stop


class Batches:
    """An endless, resumable iterator over batches of a corpus's training documents.

    Every epoch visits each window once, in an order given by `seed` and the epoch. Windows are taken in that order
    for as long as they fit in `batch_bytes`; a batch never spans epochs, so an epoch's last one may be small. Of
    each `world_size` batches in a row, `rank` gets the one of its number: ranks share no window and lose none, all
    hold the same state, and it may be resumed with another number of ranks.

    Args:
        window: most bytes of a window, BOS and EOS included.
        batch_bytes: most bytes of a batch (T), at least `window`.
        eos: put EOS, a token of its own, after the last byte of each document.
        limit_bytes: an epoch has so many bytes of text, in windows drawn by ``seed``; None for all.

    Raises:
        ValueError: sizes or ranks out of range.
        UserError: every document holds a token longer than a window.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        window: int,
        batch_bytes: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        eos: bool = True,
        limit_bytes: int | None = None,
    ) -> None:
        check_sizes(window, batch_bytes)
        check_rank(rank, world_size)
        self.limit_bytes = limit_bytes
        self.corpus, self.seed, self.rank, self.world_size, self.eos = corpus, seed, rank, world_size, eos
        self.window, self.batch_bytes = window, batch_bytes
        self.windows = cut_windows(corpus.train, window - 1 - eos)
        if not len(self.windows):
            raise UserError(f"every training document holds a token longer than a window of {window} bytes: widen it")
        if limit_bytes is not None:
            self.windows = self.windows.sample(limit_bytes, seed, WINDOWS_DRAWN)
        self._sizes = row_sizes(self.windows, eos)
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self._epoch

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> AlignedBatch:
        return self.build_next()

    def build_next(self, *, pin: bool = False, threads: int | None = None) -> AlignedBatch:
        """The next batch, in page-locked memory where ``pin``, by ``threads`` threads: see `align_pack`."""
        round_of_batches = [self._next_windows() for _ in range(self.world_size)]
        mine = round_of_batches[self.rank]
        return build_batch(self.corpus, self.corpus.train, self.windows, mine, self.eos, pin=pin, threads=threads)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins; the same on every rank."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            ValueError: the state is of another corpus, window, seed or use of EOS.
        """
        for name, value in self._identity().items():
            if (saved := state.get(name)) != value:
                raise ValueError(f"cannot resume batches with {name} = {value!r}: they were saved with {saved!r}")
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    @staticmethod
    def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state for any number of ranks out of the states of all of them."""
        return states[0]

    def close(self) -> None:
        """Nothing to be given back: as `StreamBatches` has it."""

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus.fingerprint,
            "window": self.window,
            "seed": self.seed,
            "eos": self.eos,
            "limit_bytes": self.limit_bytes,
        }

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = Order.shuffled(self._sizes, self.seed, epoch)

    def _next_windows(self) -> np.ndarray:
        chosen, self._position = self._order.take(self._position, self.batch_bytes)
        if self._position == len(self._order):
            self._start_epoch(self._epoch + 1)
        return chosen


def held_out_batches(corpus: Corpus, *, window: int, batch_bytes: int, limit_bytes: int) -> list[AlignedBatch]:
    """Batches of about `limit_bytes` of held-out text, the same on every call and machine, without EOS.

    Windows are drawn without replacement from all held-out documents; a split smaller than `limit_bytes` is used
    whole.
    """
    check_sizes(window, batch_bytes)
    split = corpus.held_out
    windows = cut_windows(split, window - 1)
    if not len(windows):
        raise UserError(f"every held-out document holds a token longer than a window of {window} bytes: widen it")
    rows, batches, position = Order(row_sizes(windows, eos=False), windows.draw(limit_bytes, 0)), [], 0
    while position < len(rows):
        chosen, position = rows.take(position, batch_bytes)
        batches.append(build_batch(corpus, split, windows, chosen, eos=False))
    return batches


def row_sizes(windows: Windows, eos: bool) -> np.ndarray:
    """Bytes of each window in a batch, with BOS and EOS: int64 [W]."""
    return windows.bytes + 1 + (windows.last & eos)


def check_sizes(window: int, batch_bytes: int) -> None:
    """Raises ValueError for a window that is too small, or a batch smaller than one."""
    if window < 3:
        raise ValueError(f"window must hold BOS, a byte and EOS: at least 3 bytes, got {window}")
    if batch_bytes < window:
        raise ValueError(f"batch_bytes {batch_bytes} is smaller than a window of {window} bytes: raise it")


def check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 … {world_size - 1} (world_size - 1), got {rank}")
