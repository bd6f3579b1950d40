"""Log-likelihoods of many texts, batched and packed: what an evaluation asks of a model."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from models.beam import MARGIN, Combine, Path, PathSearch, count_chunks, greedy_detour
from models.byte_lm import ByteLM
from models.likelihood import path_rows, refuse_leaks
from models.padding import PADDING, pack_with_padding
from models.utf8 import to_bytes

BYTES_PER_CHUNK = 8  # how far ahead a window's end is first looked for


@dataclass(frozen=True)
class ContinuationScore:
    """What a model thinks of a text.

    Attributes:
        log_likelihood: in nats.
        num_bytes: of the text that was scored.
        is_greedy: greedy decoding writes it.
    """

    log_likelihood: float
    num_bytes: int
    is_greedy: bool

    @property
    def bits_per_byte(self) -> float:
        """``-log2 P / bytes``; NaN where there are no bytes."""
        return -self.log_likelihood / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    @staticmethod
    def joined(pieces: "Sequence[ContinuationScore]") -> "ContinuationScore":
        """The score of a text from those of its pieces."""
        return ContinuationScore(
            math.fsum(piece.log_likelihood for piece in pieces),
            sum(piece.num_bytes for piece in pieces),
            all(piece.is_greedy for piece in pieces),
        )


def batches(lengths: Sequence[int], batch_bytes: int) -> Iterator[list[int]]:
    """Indices of the sequences, longest first, in batches of at most ``batch_bytes`` or of one sequence."""
    batch: list[int] = []
    filled = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and filled + lengths[i] > batch_bytes:
            yield batch
            batch, filled = [], 0
        batch.append(i)
        filled += lengths[i]
    if batch:
        yield batch


@contextmanager
def numbered(number: int) -> Iterator[None]:
    """Says in a ValueError which of several pairs it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"pair {number}: {error}") from None


def check_batch_bytes(batch_bytes: int) -> None:
    if batch_bytes < 1:
        raise ValueError(f"batch_bytes must be >= 1, got {batch_bytes}")


def positions_of(config: Any) -> int | None:
    """How many chunks or tokens a transformer was made for; None where it does not say."""
    return getattr(config, "max_position_embeddings", None)


def window_limit(window: int | None, most: int | None) -> int | None:
    if window is None:
        return most
    if window < 2 or (most is not None and window > most):
        limit = "" if most is None else f" ... {most}, the core's positions"
        raise ValueError(f"window must be at least 2{limit}, got {window}")
    return window


class Scorer:
    """Scores texts by a byte-level model after stage 2.

    A continuation y of n bytes after a context x of c bytes, with b the bits of the router's path, is worth

        log P(y, b_c ... b_{c+n-1} | x, b_{<c})
            = log P(b_c | x, b_{<c}) + sum_{t=1}^{n-1} log P(y_t, b_{c+t} | x, y_{<t}, b_{<c+t})
              + log sum_b P(y_n, b | x, y_{<n}, b_{<c+n}),

    a lower bound on ``log P(y | x, b_{<c})``: the context's last bit, which the continuation decides, is paid for, the
    last byte's bit is summed out. BOS stands before x, its bit is given, and with an empty context the first term is 0.
    With ``beam`` K > 1 up to K paths (:mod:`models.beam`) take the router's place, all with its bits before b_c; the
    bound of a wider beam is never lower.

    ``is_greedy`` says that ``generate(model, context, max_new_bytes=n)`` (greedy, jointly) writes the continuation.

    Scores don't depend on what else is scored nor on ``batch_bytes``, but for rounding (``docs/scoring.md``).

    Args:
        model: in evaluation mode.
        batch_bytes: most bytes of one forward pass; a longer sequence has one of its own.
        beam: most paths for each string.
        combine: what is made of a beam: the ``sum`` of its paths, or its ``best``.
        margin: nats below a string's best path from which on a beam does not look at a bit's other value.
        truncate: drop the first bytes of a context that does not fit into the core's positions, instead of an error.

    Raises:
        ValueError: a value out of range, or a model whose dechunk weight sees the next byte.
    """

    def __init__(
        self,
        model: ByteLM,
        *,
        batch_bytes: int = 65536,
        beam: int = 1,
        combine: Combine = "sum",
        margin: float = MARGIN,
        truncate: bool = False,
    ) -> None:
        refuse_leaks(model)
        check_batch_bytes(batch_bytes)
        if beam < 1:
            raise ValueError(f"beam must be >= 1, got {beam}: 1 is the router's path alone")
        if combine not in get_args(Combine):
            raise ValueError(f"combine must be one of {', '.join(get_args(Combine))}, got {combine!r}")
        if not margin >= 0:
            raise ValueError(f"margin must be >= 0 nats, got {margin}")
        self.model, self.batch_bytes, self.truncate = model, batch_bytes, truncate
        self.beam, self.combine, self.margin = beam, combine, margin
        self.positions = positions_of(model.config.core_config())

    def score(self, pairs: Sequence[tuple[str | bytes, str | bytes]]) -> list[ContinuationScore]:
        """Log-likelihoods of continuations, each given its context, in the order of the pairs.

        Args:
            pairs: (context, continuation); a context may be empty.

        Raises:
            ValueError: an empty continuation, a reserved byte, or more chunks than the core has positions.
        """
        sequences = []
        for number, (context, continuation) in enumerate(pairs):
            with numbered(number):
                x, y = to_bytes(context), to_bytes(continuation)
                if not y:
                    raise ValueError("the continuation is empty: give at least one byte to score")
                sequences.append(_Sequence(self.fitted_context(x, y), y))
        return self._scored(sequences)

    def rolling(self, texts: Sequence[str | bytes], *, window: int | None = None) -> list[ContinuationScore]:
        """Log-likelihoods of whole texts given BOS, in their order; an empty text's is 0.

        A text with more chunks than a window holds is cut at ends of the router's chunks into windows, each of which
        begins with BOS and is scored without what came before it: every byte is scored once, and the sum is the
        log-likelihood of the text in these pieces.

        Args:
            texts: of any length.
            window: most chunks of a window, BOS's included; as many as the core has positions where it is None.

        Raises:
            ValueError: a reserved byte, or a window of less than 2 chunks or more than the core has positions.
        """
        limit = window_limit(window, self.positions)
        pieces = [list(self._windows(to_bytes(text), limit)) for text in texts]
        scores = iter(self._scored([_Sequence(b"", piece) for text in pieces for piece in text]))
        return [ContinuationScore.joined([next(scores) for _ in text]) for text in pieces]

    # ------------------------------------------------------------------------------------------------- room

    def fitted_context(self, context: bytes, continuation: bytes = b"", spare: int = 0) -> bytes:
        """A context with which the text fits into the core's positions: all of it or, with ``truncate``, its end.

        It is cut at an end of the router's chunks.

        Args:
            context, continuation: of a text to score, or to write on after.
            spare: positions that must be left.

        Raises:
            ValueError: the context is too long and ``truncate`` is False, or without it there is no room either.
        """
        if self.positions is None or 1 + len(context) + len(continuation) <= self.positions - spare:
            return context
        boundary = self._route(context + continuation, len(context))
        excess = count_chunks(boundary) + spare - self.positions
        if excess <= 0:
            return context
        needs = f"{count_chunks(boundary)} chunks" + (f" and {spare} to be written" if spare else "")
        needs += f" are more than the core's {self.positions} positions"
        ends = np.flatnonzero(boundary)[1:]  # bytes up to each chunk's end, BOS's left out
        if excess > len(ends) or ends[excess - 1] > len(context):
            fix = "write fewer bytes" if spare else "score it in pieces, or by rolling()"
            raise ValueError(f"{needs}, even without the context: {fix}")
        if not self.truncate:
            raise ValueError(f"{needs}: shorten the context, or use truncate=True")
        return self.fitted_context(context[int(ends[excess - 1]) :], continuation, spare)

    def _windows(self, data: bytes, limit: int | None) -> Iterator[bytes]:
        while data:
            end = len(data) if limit is None or len(data) < limit else self._window_end(data, limit)
            yield data[:end]
            data = data[end:]

    def _window_end(self, data: bytes, limit: int) -> int:
        """How many bytes make, with BOS, no more than ``limit`` chunks."""
        ahead = BYTES_PER_CHUNK * limit
        while True:
            ends = np.flatnonzero(self._route(data[:ahead])[:-1])  # ends[0] is BOS; the last byte's bit isn't known yet
            if len(ends) >= limit:
                break
            if ahead >= len(data):
                return len(data)
            ahead *= 2
        if not self.model.config.constrain_chunks:
            return int(ends[limit - 1])
        # Without what follows a piece's chunks may be others, and more; one byte is two at most, BOS's included.
        return next(
            int(end) for end in (*ends[limit - 1 : 0 : -1], 1) if count_chunks(self._route(data[:end])) <= limit
        )

    @torch.no_grad()
    def _route(self, data: bytes, context: int = 0) -> np.ndarray:
        """The router's bits of BOS and the bytes after it, of which some are given: bool [len(data) + 1]."""
        ids, cu_seqlens = pack_with_padding([data], self.model.device)
        given = torch.tensor([context, 0], device=ids.device)
        return self.model.route(ids, cu_seqlens, given).boundary[: len(data) + 1].cpu().numpy()

    # ------------------------------------------------------------------------------------------------- paths

    def _scored(self, sequences: "Sequence[_Sequence]") -> list[ContinuationScore]:
        paths = self._evaluate(sequences)
        greedy = self._greedy(sequences, paths)
        searches = [PathSearch(path, self.beam, margin=self.margin, most_chunks=self.positions) for path in paths]
        count = 1
        while proposals := [(s, path) for s, search in enumerate(searches) for path in search.propose(count)]:
            whose, boundaries = zip(*proposals, strict=True)
            found = self._evaluate([sequences[s] for s in whose], boundaries)
            for s, path in zip(whose, found, strict=True):
                searches[s].add(path)
            count *= 2
        return [
            ContinuationScore(search.log_likelihood(self.combine), len(sequence.continuation), is_greedy)
            for sequence, search, is_greedy in zip(sequences, searches, greedy, strict=True)
        ]

    def _greedy(self, sequences: "Sequence[_Sequence]", paths: Sequence[Path]) -> list[bool]:
        """Whether greedy decoding writes each continuation: where its bits leave the router's path, it is followed."""
        found: dict[int, bool] = {}
        asked = dict(enumerate(paths))
        while asked:
            detours = {}
            for s, path in asked.items():
                given = len(sequences[s].context)
                # What a router that doesn't look ahead says of the context's last bit, decoding takes from it.
                first = given if given and not self.model.config.lookahead else max(given - 1, 0)
                answer = greedy_detour(path, sequences[s].data, first)
                if isinstance(answer, bool):
                    found[s] = answer
                elif self.positions is not None and count_chunks(answer) > self.positions:
                    found[s] = False
                else:
                    detours[s] = answer
            evaluated = self._evaluate([sequences[s] for s in detours], list(detours.values()))
            asked = dict(zip(detours, evaluated, strict=True))
        return [found[s] for s in range(len(sequences))]

    @torch.no_grad()
    def _evaluate(self, sequences: "Sequence[_Sequence]", boundaries: Sequence[np.ndarray] | None = None) -> list[Path]:
        """Evaluate a path of each sequence, the router's where none are given, in few packed forward passes."""
        found: dict[int, Path] = {}
        for batch in batches([sequence.length for sequence in sequences], self.batch_bytes):
            ids, cu_seqlens = pack_with_padding([sequences[i].data for i in batch], self.model.device)
            given = torch.tensor([*(len(sequences[i].context) for i in batch), 0], device=ids.device)
            boundary = None
            if boundaries is not None:
                bits = np.concatenate([*(boundaries[i] for i in batch), np.ones(len(PADDING), dtype=bool)])
                boundary = torch.from_numpy(bits).to(ids.device)
            output = self.model(ids, cu_seqlens, boundary, given)
            chosen = output.routing.boundary
            rows = path_rows(output.logits, ids, cu_seqlens, chosen, given)
            columns = [tensor.cpu().numpy() for tensor in (chosen, *rows)]
            start = 0
            for i in batch:
                stop = start + sequences[i].length
                bits, log_probs, flips, favourites = (column[start:stop] for column in columns)
                found[i] = Path(bits, math.fsum(log_probs), flips, favourites)
                start = stop
        return [found[i] for i in range(len(sequences))]


@dataclass(frozen=True)
class _Sequence:
    """A context and its continuation, in bytes."""

    context: bytes
    continuation: bytes

    @property
    def data(self) -> bytes:
        return self.context + self.continuation

    @property
    def length(self) -> int:
        """With BOS."""
        return 1 + len(self.data)
