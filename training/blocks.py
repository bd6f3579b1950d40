"""Streamed text, block after block: which stream reads what, and the making of a block.

Nothing here needs torch, so that a worker process starts in a fraction of a second.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from training.alignment import Aligned, TokenBytes
from training.corpus import SPLIT_DTYPES, Split, align_documents
from training.errors import UserError
from training.parts import Part, read_part
from training.text import Document, Skipped, is_held_out

PARTS_ORDER = 1  # the purpose of a seed
WHOLE = 2**32
GOLDEN = 2654435769  # 2^32 over the golden ratio: its multiples lie evenly in [0, 2^32)


class Share(NamedTuple):
    """What one stream reads of a part: the records whose number, times GOLDEN, falls in [low, high) modulo 2^32."""

    part: int
    low: int
    high: int

    def holds(self, number: int) -> bool:
        return self.low <= number * GOLDEN % WHOLE < self.high


def share_out(sizes: Sequence[int], streams: int) -> list[list[Share]]:
    """Cuts parts of these sizes into `streams` shares of one size.

    The parts lie one after another on a line, which is cut into equal pieces. A part that lies in one piece is that
    stream's alone; one that several pieces reach into gives each of them its portion of records, spread over the part.
    """
    total = sum(sizes)
    shares: list[list[Share]] = [[] for _ in range(streams)]
    begin = 0
    for part, size in enumerate(sizes):
        # In units of 1/streams: exact in integers.
        first, last = begin * streams // total, ((begin + size) * streams - 1) // total
        bounds = [(cut * total - begin * streams) * WHOLE // (size * streams) for cut in range(first, last + 2)]
        bounds[0], bounds[-1] = 0, WHOLE
        for stream, low, high in zip(range(first, last + 1), bounds[:-1], bounds[1:], strict=True):
            shares[stream].append(Share(part, low, high))
        begin += size
    return shares


class Position(NamedTuple):
    """A place in a stream: records read of a share, in the epoch's order, and documents used in this epoch so far."""

    epoch: int = 0
    share: int = 0
    record: int = 0
    documents: int = 0


class Block(NamedTuple):
    """Aligned documents, the position after them, and (reason, source) of what was skipped on the way."""

    split: Split
    after: Position
    skipped: list[tuple[str, str]]


class BlockMaker:
    """Reads, tokenizes and aligns the blocks of any stream. It can be sent to another process.

    Args:
        parts: the text.
        tokens: of the tokenizer.
        seed: of the order of a stream's parts in each epoch.
        streams: number of streams.
        longest: most bytes of a token; documents with a longer one are skipped.
    """

    def __init__(self, parts: Sequence[Part], tokens: TokenBytes, *, seed: int, streams: int, longest: int) -> None:
        self.parts, self.tokens, self.seed, self.longest = parts, tokens, seed, longest
        self.shares = share_out([part.size for part in parts], streams)
        self._readers: dict[int, _Reader] = {}  # of the streams read last, each where its block ended

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_readers": {}}

    def make(self, stream: int, position: Position, size: int) -> Block:
        """The block of a stream that begins at a position: documents until they reach `size` bytes or the epoch ends.

        Documents that are held out never come up. A block holds at least one document, and depends on the arguments
        alone.

        Raises:
            UserError: the stream has no document at all in this epoch.
        """
        reader = self._readers.pop(stream, None)
        if reader is None or reader.position != position:
            reader = _Reader(self.parts, self.shares[stream], position, (self.seed, PARTS_ORDER, stream))
        found: list[tuple[Document, Aligned]] = []
        while not found:
            texts = reader.read(size)
            found = list(align_documents(texts, self.tokens, reader.skipped, self.longest))
            if not reader.end_of_block(len(found)):
                raise UserError(
                    f"data stream {stream} of {len(self.shares)} found no text to train on in epoch "
                    f"{reader.position.epoch} (skipped: {reader.skipped}): lower data.streams, give more or readable "
                    "text, or prepare so little text with data.stream = false"
                )
        self._readers[stream] = reader
        return Block(_split_of(found), reader.position, reader.skipped.take())


class _Reader:
    """A stream's documents from a position on, endless."""

    def __init__(self, parts: Sequence[Part], shares: list[Share], position: Position, key: tuple[int, ...]) -> None:
        self.parts, self.shares, self.position, self.key = parts, shares, position, key
        self.skipped = _Noted()
        self._order = self._shuffled()
        self._share: Iterator[tuple[int, Document]] | None = None

    def read(self, size: int) -> list[Document]:
        """Documents until they reach `size` bytes or the epoch ends."""
        documents: list[Document] = []
        total = 0
        while total < size and self.position.share < len(self._order):
            if self._share is None:
                self._share = self._open()
            found = next(self._share, None)
            if found is None:
                self._share = None
                self.position = self.position._replace(share=self.position.share + 1, record=0)
            else:
                number, document = found
                self.position = self.position._replace(record=number)
                documents.append(document)
                total += len(document.text)
        return documents

    def end_of_block(self, documents: int) -> bool:
        """Counts documents that were used, and begins the next epoch at the end of one; False where it had none."""
        self.position = self.position._replace(documents=self.position.documents + documents)
        if self.position.share == len(self._order):
            if not self.position.documents:
                return False
            self.position = Position(self.position.epoch + 1)
            self._order = self._shuffled()
        return True

    def _shuffled(self) -> list[Share]:
        order = np.random.Generator(np.random.Philox((*self.key, self.position.epoch))).permutation(len(self.shares))
        return [self.shares[i] for i in order]

    def _open(self) -> Iterator[tuple[int, Document]]:
        share = self._order[self.position.share]

        def wanted(number: int, source: str) -> bool:
            return share.holds(number) and not is_held_out(source)

        return read_part(self.parts[share.part], self.skipped, wanted, self.position.record)


class _Noted(Skipped):
    """What was skipped since it was last asked for. It is logged where batches are made."""

    def add(self, reason: str, source: str) -> None:
        self.counts[reason] += 1
        self.first[reason].append(source)

    def take(self) -> list[tuple[str, str]]:
        found = [(reason, source) for reason, sources in self.first.items() for source in sources]
        self.counts.clear()
        self.first.clear()
        return found


def _split_of(documents: Sequence[tuple[Document, Aligned]]) -> Split:
    aligned = [found for _, found in documents]
    return Split(
        text=np.frombuffer(b"".join(document.text for document, _ in documents), dtype=np.uint8),
        doc_offsets=_offsets([len(document.text) for document, _ in documents]),
        token_ids=np.concatenate([found.ids for found in aligned]).astype(SPLIT_DTYPES["token_ids"], copy=False),
        token_lengths=np.concatenate([found.lengths for found in aligned]).astype(SPLIT_DTYPES["token_lengths"]),
        token_offsets=_offsets([len(found.ids) for found in aligned]),
    )


def _offsets(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
