"""Batches of text that is read, tokenized and aligned while it is trained on."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from bytekernels import AlignedBatch
from training import workers
from training.alignment import TokenBytes
from training.blocks import Block, BlockMaker, Position
from training.corpus import MAX_TOKEN_BYTES
from training.data import Order, Windows, build_batch, check_rank, check_sizes, cut_windows, row_sizes
from training.errors import UserError
from training.parts import Part, identity_of
from training.text import Skipped
from training.workers import Maker

WINDOWS_ORDER = 2  # the purpose of a seed
DOUBLINGS = 5  # of a stream's blocks until they are of full size
AHEAD = 3  # blocks ahead, for each worker process


class StreamBatches:
    """An endless, resumable iterator over batches of the training documents in parts of any size.

    The text is cut into `streams` shares, each a logical stream of its own. Batch number n over all ranks comes from
    stream n mod `streams`, and goes to rank n mod `world_size`, which must divide `streams`: what is trained on, and in
    which order, does not depend on the number of ranks, and no rank reads another's share.

    A stream is read block by block. A block is a run of documents, cut into windows that are visited in an order given
    by `seed`, the stream and the block's number; batches are packed from them as `Batches` does, and span neither
    blocks nor epochs. Streams go from epoch to epoch by themselves, each with its parts in another order.

    Args:
        parts: the text; a document that is held out by the hash of its source never comes up.
        tokens: of the tokenizer.
        window: most bytes of a window, BOS and EOS included.
        batch_bytes: most bytes of a batch (T), at least `window`.
        streams: number of logical streams over all ranks.
        shuffle_bytes: text in the blocks of all streams together; a block is at least a batch.
        workers: processes that make blocks, for this rank; 0 for the calling thread.
        eos: put EOS, a token of its own, after the last byte of each document.

    Raises:
        ValueError: sizes or ranks out of range.
        UserError: no parts, or streams that the ranks can't share.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        tokens: TokenBytes,
        *,
        window: int,
        batch_bytes: int,
        seed: int,
        streams: int = 64,
        shuffle_bytes: int = 2**28,
        workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        eos: bool = True,
    ) -> None:
        check_sizes(window, batch_bytes)
        check_rank(rank, world_size)
        if streams % world_size:
            raise UserError(
                f"data.streams = {streams} can't be shared evenly by {world_size} ranks: set it to a multiple of "
                f"{world_size}, such as {-(-streams // world_size) * world_size}"
            )
        if not parts:
            raise UserError("there is no text to stream: give files or datasets that hold some")
        self.window, self.batch_bytes, self.eos = window, batch_bytes, eos
        self.seed, self.streams, self.rank, self.world_size = seed, streams, rank, world_size
        self.tokens = tokens
        self._longest = window - 1 - eos
        self._full = max(shuffle_bytes // streams, batch_bytes)
        self._text = identity_of(parts)
        self._maker = BlockMaker(parts, tokens, seed=seed, streams=streams, longest=min(self._longest, MAX_TOKEN_BYTES))
        self._workers = workers
        self._makers: list[Maker] = []
        self._told = Skipped()
        self._number = 0  # of the next batch of all ranks
        self._cursors = {stream: self._cursor(stream) for stream in range(rank, streams, world_size)}

    @property
    def epoch(self) -> int:
        """The epoch that the slowest of this rank's streams is in, from 0."""
        return min(cursor.position.epoch for cursor in self._cursors.values())

    @property
    def skipped(self) -> Counter[str]:
        """How many records of this rank's streams could not be used, by reason; once more in every epoch."""
        return sum((cursor.skipped_with_block() for cursor in self._cursors.values()), Counter())

    def __iter__(self) -> "StreamBatches":
        return self

    def __next__(self) -> AlignedBatch:
        return self.build_next()

    def build_next(self, *, pin: bool = False, threads: int | None = None) -> AlignedBatch:
        """The next batch, in page-locked memory where ``pin``, by ``threads`` threads: see `align_pack`.

        Raises:
            UserError: a stream without any text in a whole epoch, or a worker process that died.
        """
        self._look_ahead()
        cursor = self._cursors[self._next_stream]
        block, windows, order = cursor.open or self._open(cursor)
        chosen, cursor.index = order.take(cursor.index, self.batch_bytes)
        batch = build_batch(self.tokens, block.split, windows, chosen, self.eos, pin=pin, threads=threads)
        if cursor.index == len(order):
            cursor.end_block(block, self._size(cursor.stream, cursor.number + 1))
        self._number += self.world_size
        return batch

    @property
    def _next_stream(self) -> int:
        return (self._number + (self.rank - self._number) % self.world_size) % self.streams

    # ------------------------------------------------------------------------------------------------------ blocks

    def _size(self, stream: int, number: int) -> int:
        """Bytes of a stream's block: small at first, so that training starts soon, and each stream another size, so
        that they don't all need a new block at the same time."""
        first = self._full * (self.streams + stream) // (self.streams << DOUBLINGS)
        return min(self._full, max(self.batch_bytes, first << min(number, DOUBLINGS)))

    def _cursor(self, stream: int) -> "_Cursor":
        return _Cursor(stream, Position(), 0, self._size(stream, 0), 0, Counter())

    def _look_ahead(self) -> None:
        """Asks for the blocks that are needed next, as many as the workers may be ahead."""
        waiting = sum(cursor.ahead is not None for cursor in self._cursors.values())
        for _ in range(waiting, AHEAD * self._workers):
            free = [cursor for cursor in self._cursors.values() if cursor.ahead is None]
            if not free:
                break
            self._ask(min(free, key=self._need))

    def _need(self, cursor: "_Cursor") -> tuple[int, int]:
        """In how many rounds of the streams, and how many batches, a new block will be needed."""
        left = -(-cursor.open.order.bytes_from(cursor.index) // self.batch_bytes) if cursor.open else 0
        return left, (cursor.stream - self._next_stream) % self.streams

    def _ask(self, cursor: "_Cursor") -> "Future[Block]":
        if not self._makers:
            self._makers = workers.start(self._maker, self._workers)
        # Always the same worker for a stream: it holds the file open where the last block ended.
        maker = self._makers[cursor.stream // self.world_size % len(self._makers)]
        if cursor.open is None:
            cursor.ahead = maker.submit(cursor.stream, cursor.position, cursor.size)
        else:
            size = self._size(cursor.stream, cursor.number + 1)
            cursor.ahead = maker.submit(cursor.stream, cursor.open.block.after, size)
        return cursor.ahead

    def _open(self, cursor: "_Cursor") -> "_Open":
        block = (cursor.ahead or self._ask(cursor)).result()
        for reason, source in block.skipped:
            self._told.add(reason, source)
        windows = cut_windows(block.split, self._longest)
        key = (self.seed, WINDOWS_ORDER, cursor.stream, cursor.number)
        cursor.ahead = None
        cursor.open = _Open(block, windows, Order.shuffled(row_sizes(windows, self.eos), *key))
        return cursor.open

    def close(self) -> None:
        """Ends the worker processes. The next batch starts new ones."""
        for maker in self._makers:
            maker.close()
        self._makers = []
        for cursor in self._cursors.values():
            cursor.ahead = None

    # ------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's next batch begins, in plain values. Those of all ranks make one with `merge_states`."""
        streams = {str(stream): cursor.state() for stream, cursor in self._cursors.items()}
        return {"batches": self._number, "streams": streams, **self._identity()}

    @staticmethod
    def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state for any number of ranks out of the states of all of them, taken after the same number of batches.

        Raises:
            ValueError: the states are not of one moment, or not of all ranks.
        """
        merged = {**states[0], "streams": {}}
        for state in states:
            for name in merged.keys() - {"streams"}:
                if state[name] != merged[name]:
                    raise ValueError(
                        f"states of different ranks do not go together: {name} is {merged[name]!r} and {state[name]!r}"
                    )
            merged["streams"] |= state["streams"]
        if len(merged["streams"]) != merged["num_streams"]:
            raise ValueError(
                f"{len(states)} states hold {len(merged['streams'])} of {merged['num_streams']} streams: give those "
                "of all ranks"
            )
        return merged

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where states were taken. Blocks are read again, so that batches are the same bit by bit.

        Raises:
            ValueError: the state is of other text, tokenizer, window, seed, number of streams or use of EOS, or lacks
                streams of this rank.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"cannot resume streamed batches with {name} = {value!r}: they were saved with {state.get(name)!r}"
                )
        lacking = [stream for stream in self._cursors if str(stream) not in state["streams"]]
        if lacking:
            raise ValueError(f"the state has no stream {lacking[0]}, which rank {self.rank} reads: merge_states first")
        self._cursors = {stream: _Cursor.at(stream, state["streams"][str(stream)]) for stream in self._cursors}
        self._number = state["batches"]

    def _identity(self) -> dict[str, Any]:
        return {
            "text": self._text,
            "tokenizer": self.tokens.fingerprint,
            "window": self.window,
            "seed": self.seed,
            "num_streams": self.streams,
            "eos": self.eos,
        }


class _Open(NamedTuple):
    """A block that batches are taken from."""

    block: Block
    windows: Windows
    order: Order


class _Cursor:
    """A stream's place: the block that begins at a position, and the next window of it."""

    def __init__(
        self, stream: int, position: Position, number: int, size: int, index: int, skipped: Counter[str]
    ) -> None:
        self.stream = stream
        self.position = position
        self.number = number  # of the block
        self.size = size  # asked for
        self.index = index
        self.skipped = skipped  # before the block
        self.ahead: Future[Block] | None = None  # this block, or where that is open the next one
        self.open: _Open | None = None

    def end_block(self, block: Block, size: int) -> None:
        self.skipped = self.skipped_with_block()
        self.position, self.number, self.size, self.index = block.after, self.number + 1, size, 0
        self.open = None

    def skipped_with_block(self) -> Counter[str]:
        if self.open is None:
            return self.skipped
        return self.skipped + Counter([reason for reason, _ in self.open.block.skipped])

    def state(self) -> dict[str, Any]:
        return {
            "position": list(self.position),
            "block": self.number,
            "size": self.size,
            "index": self.index,
            "skipped": dict(self.skipped),
        }

    @classmethod
    def at(cls, stream: int, state: dict[str, Any]) -> "_Cursor":
        place = Position(*state["position"])
        return cls(stream, place, state["block"], state["size"], state["index"], Counter(state["skipped"]))
