"""Noise on the characters of training batches, and which byte of the noised text stands for which of the clean one.

A sequence's characters are the code points of its text. Each noised sequence is noised in one way:

- ``upper``: ASCII letters in upper case; ``random_case``: each of them in either case.
- ``drop``: characters left out; ``repeat``: characters written twice; ``spaces``: spaces put before characters.
- ``no_spaces``: all spaces left out.
- ``antspeak``: upper case, with a space before each character but the first.

How a token's end is carried to the noised text: **every token keeps exactly one end, on the last byte that is left of
it.** So

1. the end of a token whose last characters are dropped moves to its last character that is left;
2. the end of a token whose last character is repeated is on the last copy;
3. an inserted space belongs to the token of the character that follows it, and is never an end;
4. a token never loses all of its characters: the last of them stays, spaces that are tokens of their own included.

BOS and EOS are left alone, and so is a character that the window or the tokenizer cuts (emoji), or that is no UTF-8:
the noised bytes are valid UTF-8 where the clean ones are. A sequence that has grown is cut after the last whole token
with which it is no longer than it was, so batches never grow; one of which not even the first token would fit stays
clean.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import bytekernels
from bytekernels import BOS, AlignedBatch

SPACE = 0x20
NONE = -1  # of a noised byte that stands for no clean one


class NoisedBatch(NamedTuple):
    """An :class:`bytekernels.AlignedBatch` with some sequences noised, and the clean batch that it was made from.

    Attributes:
        ids, cu_seqlens, token_end, token_ids, token_cu, targets: as in AlignedBatch, of the noised text. Tokens are
            those of the clean text, as many as fit; each ends once.
        clean_ids: uint8 [C], the clean bytes.
        clean_cu: int32 [S+1], where sequences begin among them.
        twin: int64 [T], the clean byte whose answer to "does a token end here?" a byte of a noised sequence takes over:
            for the last byte of a token the clean token's last byte, else the byte that it is the last copy of. -1 for
            none: inserted spaces, earlier copies, and all bytes of sequences that are clean.
    """

    ids: Tensor
    cu_seqlens: Tensor
    token_end: Tensor
    token_ids: Tensor
    token_cu: Tensor
    targets: Tensor | None
    clean_ids: Tensor
    clean_cu: Tensor
    twin: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "NoisedBatch":
        """The batch on another device."""
        moved = [None if t is None else t.to(device, non_blocking=non_blocking) for t in self]
        return NoisedBatch(*moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Noise:
    """What is done to batches. The draws for a sequence depend on its own bytes and the seed, and on no other sequence.

    Attributes:
        share: of the sequences that are noised, each by a draw of its own.
        kinds: each noised sequence is noised in one of these ways.
        rate: share of the characters that ``drop``, ``repeat`` and ``spaces`` act on.
        seed: of the draws.
    """

    share: float
    kinds: Sequence[str]
    rate: float
    seed: int

    def apply(self, batch: AlignedBatch) -> NoisedBatch:
        """Noise a batch on the CPU."""
        clean, ends = batch.ids.numpy(), batch.token_end.numpy()
        cu, token_cu = batch.cu_seqlens.tolist(), batch.token_cu.tolist()
        pieces, twins, ended, tokens = _Parts(np.uint8), _Parts(np.int64), _Parts(bool), _Parts(np.int64)
        for s, start in enumerate(cu[:-1]):
            ids, end = clean[start : cu[s + 1]], ends[start : cu[s + 1]]
            noised = self._sequence(ids, end)
            if noised is None:
                pieces.append(ids)
                twins.append(np.full(len(ids), NONE))
                ended.append(end)
                tokens.append(np.arange(token_cu[s], token_cu[s + 1]))
            else:
                has_twin = noised.twin >= 0
                pieces.append(noised.ids)
                twins.append(np.where(has_twin, noised.twin + start, NONE))
                ended.append(has_twin & end[noised.twin])
                tokens.append(np.arange(token_cu[s], token_cu[s] + int(ended[-1].sum())))
        ids, token_end, cu_seqlens = pieces.joined(), ended.joined(), pieces.offsets()
        targets = None if batch.targets is None else bytekernels.next_byte_targets(ids, cu_seqlens, token_end)
        token_ids = batch.token_ids[tokens.joined()]
        aligned = AlignedBatch(ids, cu_seqlens, token_end, token_ids, tokens.offsets(), targets)
        return NoisedBatch(*aligned, batch.ids, batch.cu_seqlens, twins.joined())

    def _sequence(self, ids: np.ndarray, token_end: np.ndarray) -> "Noised | None":
        """A sequence noised, or None where it is to stay clean."""
        draw = content_generator(self.seed, ids)
        if not draw.random() < self.share:
            return None
        kind = self.kinds[int(draw.integers(len(self.kinds)))]
        return noise_sequence(ids, token_end, kind, self.rate, draw)


def content_generator(seed: int, ids: np.ndarray) -> np.random.Generator:
    """Draws that depend on a seed and a sequence's bytes (uint8) alone."""
    content = hashlib.sha256(seed.to_bytes(8, "little", signed=True))
    content.update(ids.tobytes())
    return np.random.Generator(np.random.Philox(int.from_bytes(content.digest()[:16], "little")))


class Noised(NamedTuple):
    """A noised sequence of T bytes.

    Attributes:
        ids: uint8 [T].
        origin: int64 [T], the clean byte that a byte is a copy of; -1 for inserted spaces.
        twin: int64 [T], as in :class:`NoisedBatch`, counted from the sequence's first byte.
    """

    ids: np.ndarray
    origin: np.ndarray
    twin: np.ndarray


def noise_sequence(
    ids: np.ndarray, token_end: np.ndarray, kind: str, rate: float, draw: np.random.Generator
) -> Noised | None:
    """Noise one sequence; None where not even its first token would fit.

    Args:
        ids: uint8 [C], with BOS and EOS where it has them.
        token_end: bool [C], the byte ends a token.
        kind: one of the ways above.
        rate: share of the characters that ``drop``, ``repeat`` and ``spaces`` act on.
        draw: where chance comes from.
    """
    if not len(ids):
        return Noised(ids, *np.zeros((2, 0), np.int64))
    starts, sizes, free = _characters(ids, token_end)
    letters = free & (ids[starts] | SPACE >= ord("a")) & (ids[starts] | SPACE <= ord("z"))
    spaces = free & (ids[starts] == SPACE)
    copies = np.ones(len(starts), np.int64)
    before = np.zeros(len(starts), bool)
    lower = letters & (ids[starts] & SPACE > 0)
    flipped = np.zeros(len(starts), bool)
    chosen = free & (draw.random(len(starts)) < rate)
    if kind in ("upper", "antspeak"):
        flipped = lower
    if kind == "random_case":
        flipped = letters & (draw.random(len(starts)) < 0.5)
    if kind in ("drop", "no_spaces"):
        dropped = chosen if kind == "drop" else spaces
        copies[dropped] = 0
        copies[_lost_tokens(dropped, starts, sizes, token_end)] = 1
    if kind == "repeat":
        copies[chosen] = 2
    if kind in ("spaces", "antspeak"):
        before = chosen if kind == "spaces" else free.copy()
        before[np.flatnonzero(free)[:1]] = False
    text = ids.copy()
    text[starts[flipped]] ^= SPACE
    return _fitted(_write(text, token_end, starts, sizes, copies, before), token_end)


def _characters(ids: np.ndarray, token_end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First bytes and sizes of the characters, and which of them are whole, and lie in one token: free to be noised."""
    continues = (ids & 0xC0) == 0x80
    continues[0] = False
    starts = np.flatnonzero(~continues)
    sizes = np.diff(np.append(starts, len(ids)))
    lead = ids[starts]
    wanted = 1 + (lead >= 0xC2).astype(np.int64) + (lead >= 0xE0) + (lead >= 0xF0)
    legal = (lead < 0x80) | ((lead >= 0xC2) & (lead < 0xF5))  # neither BOS, EOS nor a continuation that begins a window
    ended = np.append(0, np.cumsum(token_end))
    inside = ended[starts + sizes - 1] - ended[starts]  # ends before the last byte
    return starts, sizes, legal & (sizes == wanted) & (inside == 0)


def _lost_tokens(dropped: np.ndarray, starts: np.ndarray, sizes: np.ndarray, token_end: np.ndarray) -> np.ndarray:
    """The last characters of tokens of which nothing would be left: places among the characters."""
    token = _token_of(token_end)
    left = np.bincount(token[np.repeat(~dropped, sizes)], minlength=token[-1] + 1)
    last = starts + sizes - 1
    closing = token_end[last] | (last == len(token_end) - 1)
    return np.flatnonzero(closing & dropped & (left[token[last]] == 0))


def _token_of(token_end: np.ndarray) -> np.ndarray:
    """The number of each byte's token."""
    return np.cumsum(token_end) - token_end


def _write(
    text: np.ndarray,
    token_end: np.ndarray,
    starts: np.ndarray,
    sizes: np.ndarray,
    copies: np.ndarray,
    before: np.ndarray,
) -> Noised:
    """So many copies of each character, with a space before the first of them where it is told."""
    before = before & (copies > 0)
    count = copies + before
    piece = np.repeat(np.arange(len(starts)), count)  # the character of each piece: a space before it, or a copy of it
    number = np.arange(len(piece)) - np.repeat(np.cumsum(count) - count, count)
    inserted = before[piece] & (number == 0)
    final = number == count[piece] - 1
    length = np.where(inserted, 1, sizes[piece])
    row = np.repeat(np.arange(len(piece)), length)
    place = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    home = starts[piece[row]] + place  # the clean byte itself, or the first one of the character that a space precedes
    origin = np.where(inserted[row], NONE, home)
    token = _token_of(token_end)
    mine = token[home]
    ends = np.flatnonzero(token_end | (np.arange(len(token_end)) == len(token_end) - 1))
    last = np.append(mine[1:] != mine[:-1], True)
    twin = np.where(last, ends[mine], np.where(final[row], origin, NONE))
    return Noised(np.where(inserted[row], SPACE, text[home]).astype(np.uint8), origin, twin)


def _fitted(noised: Noised, token_end: np.ndarray) -> Noised | None:
    """Cut after the last whole token within the clean length; None where there is no such token, BOS left out."""
    limit = len(token_end)
    if len(noised.ids) <= limit:
        return noised
    closed = (noised.twin >= 0) & token_end[noised.twin]
    fitting = np.flatnonzero(closed[:limit])
    fitting = fitting[noised.ids[fitting] != BOS]
    if not len(fitting):
        return None
    stop = fitting[-1] + 1
    return Noised(*(part[:stop] for part in noised))


class _Parts(list[np.ndarray]):
    """Arrays of the sequences, to be packed."""

    def __init__(self, dtype: type) -> None:
        super().__init__()
        self.dtype = dtype

    def joined(self) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, self.dtype), *self]))

    def offsets(self) -> Tensor:
        """int32 [S+1], where each begins."""
        return torch.tensor([0, *map(len, self)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
