"""Strings that end a text: found on the device byte by byte, and kept out of what is streamed."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from models.utf8 import to_bytes

Stops = str | bytes | Sequence[str | bytes] | Sequence[Sequence[str | bytes]]


def stops_for_each(stop: Stops, prompts: int) -> list[list[bytes]]:
    """The stop strings of each prompt, longest first.

    Raises:
        TypeError: what is neither a string nor bytes nor a sequence of them.
        ValueError: an empty string, or sequences of strings that are not as many as prompts.
    """
    strings = [stop] if isinstance(stop, str | bytes) else _listed(stop)
    shared = [one for one in strings if isinstance(one, str | bytes)]
    if len(shared) == len(strings):
        return [_longest_first(shared)] * prompts
    each = [_listed(one) for one in strings if not isinstance(one, str | bytes)]
    if shared or len(strings) != prompts:
        raise ValueError(f"stop must be strings for all prompts, or sequences of them for {prompts}, got {stop!r}")
    return [_longest_first(one) for one in each]


def _listed(strings: Any) -> list[Any]:
    if isinstance(strings, bytearray | memoryview) or not isinstance(strings, Iterable):
        raise TypeError(
            f"stop strings must be str or bytes, in a sequence of them or in one for each prompt, got {strings!r} "
            "(for none leave stop out, or use ())"
        )
    return list(strings)


def _longest_first(strings: Sequence[str | bytes]) -> list[bytes]:
    for one in strings:
        if not isinstance(one, str | bytes):
            raise TypeError(f"stop strings must be str or bytes, got {one!r}")
    encoded = {to_bytes(one) for one in strings}
    if b"" in encoded:
        raise ValueError(f"a stop string must not be empty, got {strings!r}")
    return sorted(encoded, key=lambda one: (-len(one), one))


@dataclass
class StopTable:
    """Each slot's stop strings, right-aligned in rows of L bytes.

    Attributes:
        rows: uint8 [S, n, L].
        free: bool [S, n, L], where any byte will do: before a string's beginning.
        given: bool [S, n], the rows that hold a string at all.
    """

    rows: Tensor
    free: Tensor
    given: Tensor

    @classmethod
    def of(cls, stops: Sequence[Sequence[bytes]], columns: int, device: torch.device) -> Self:
        """The strings of S slots in rows of L = ``columns`` bytes, as many as the longest has or more."""
        rows = max((len(strings) for strings in stops), default=0)
        table = torch.zeros(len(stops), rows, columns, dtype=torch.uint8)
        free = torch.ones(table.shape, dtype=torch.bool)
        given = torch.zeros(table.shape[:2], dtype=torch.bool)
        for slot, strings in enumerate(stops):
            for row, one in enumerate(strings):
                table[slot, row, columns - len(one) :] = torch.tensor(list(one), dtype=torch.uint8)
                free[slot, row, columns - len(one) :] = False
                given[slot, row] = True
        return cls(table.to(device), free.to(device), given.to(device))

    @property
    def longest(self) -> int:
        """L."""
        return self.rows.shape[2]

    def matches(self, tail: Tensor) -> Tensor:
        """bool [S, n]: whether each slot's newest bytes, uint8 [S, L], end with each of its strings."""
        return ((tail[:, None] == self.rows) | self.free).all(-1) & self.given


class Release:
    """The bytes of one text on their way out: the beginning of a stop string waits until it can't be one.

    Args:
        stops: the strings that end the text.
        given: how many of its bytes have gone out.
        told: how many of its bytes have gone out as characters, at most three fewer.
    """

    def __init__(self, stops: Sequence[bytes], given: int = 0, told: int = 0) -> None:
        self._stops = stops
        self.given, self.told = given, told
        self._bytes = bytearray()
        self._bits: list[bool] = []

    def __len__(self) -> int:
        """Bytes that have come in."""
        return len(self._bytes)

    def add(self, data: bytes, bits: Iterable[bool]) -> None:
        self._bytes += data
        self._bits += bits

    def take(self, *, drop: int = 0, hold: bool = True, last: bool = False) -> tuple[bytes, tuple[bool, ...], str]:
        """Bytes, their bits and the characters they complete that may go out now; none goes out twice.

        Args:
            drop: bytes at the end that are no part of the text.
            hold: keep back what may yet be a stop string.
            last: give U+FFFD for a character that has only begun.
        """
        begin, self.given = self.given, max(self.given, len(self._bytes) - (self._waiting() if hold else drop))
        text, size = codecs.utf_8_decode(self._bytes[self.told : self.given], "replace", last)
        self.told += size
        return bytes(self._bytes[begin : self.given]), tuple(self._bits[begin : self.given]), text

    def _waiting(self) -> int:
        """The length of the longest end of the bytes that begins a stop string."""
        most = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(most, len(self._bytes)), 0, -1):
            end = bytes(self._bytes[-size:])
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
