"""Several paths of bits through one byte string: which to look at next, and what they come to together.

Any set of distinct paths bounds the probability of the bytes from below, ``P(bytes) >= sum_{paths} P(bytes, path)``.
The search is best first. A forward pass along a path also says, at each uncertain bit, what the other bit would have
cost there; with everything else unchanged that is what the path with this one bit flipped would be worth. The most
promising flips are evaluated next, all strings' in one packed forward pass: the router's path alone, then one path
more, then two, four, ... Each round's choice depends on the rounds before it and not on how many paths are wanted, so
the paths of a narrow beam are among those of a wider one: its bound is never above the wider one's, and the router's
path is always there.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Combine = Literal["sum", "best"]
MARGIN = 8.0


@dataclass(frozen=True)
class Path:
    """One path of bits through a string of n bytes (BOS included), evaluated.

    Attributes:
        boundary: bool [n].
        log_likelihood: of the scored bytes and their bits, in nats.
        flips: float64 [n]; row t is what another bit at byte t+1 would bring there, -inf where it is no free bit.
        favourites: int64 [n]; row t is the likeliest next byte + 256 x its bit.
    """

    boundary: np.ndarray
    log_likelihood: float
    flips: np.ndarray
    favourites: np.ndarray


class PathSearch:
    """The paths through one string that have been evaluated, best first.

    Args:
        first: the path to start from.
        beam: K >= 1, most paths to evaluate.
        margin: nats below the best path from which on a flip is not looked at.
        most_chunks: paths with more chunks are not looked at; None for any.
    """

    def __init__(self, first: Path, beam: int, *, margin: float = MARGIN, most_chunks: int | None = None) -> None:
        self.paths = [first]
        self.beam, self.margin, self.most_chunks = beam, margin, most_chunks
        self._seen = {first.boundary.tobytes()}

    def propose(self, count: int) -> list[np.ndarray]:
        """The most promising paths that have not been proposed yet, at most ``count`` and what the beam has left."""
        count = min(count, self.beam - len(self.paths))
        if count <= 0:
            return []
        promise = np.stack([path.log_likelihood + path.flips for path in self.paths])  # [paths, n]
        least = max(self.best - self.margin, -np.finfo(np.float64).max)
        found: list[np.ndarray] = []
        for index in np.argsort(-promise, axis=None, kind="stable"):
            parent, row = divmod(int(index), promise.shape[1])
            if promise[parent, row] < least or len(found) == count:
                break
            boundary = self.paths[parent].boundary.copy()
            boundary[row + 1] ^= True
            key = boundary.tobytes()
            if key not in self._seen and self._fits(boundary):
                self._seen.add(key)
                found.append(boundary)
        return found

    def add(self, path: Path) -> None:
        """A proposed path, evaluated."""
        self.paths.append(path)

    def _fits(self, boundary: np.ndarray) -> bool:
        return self.most_chunks is None or count_chunks(boundary) <= self.most_chunks

    @property
    def best(self) -> float:
        """The best path's log-likelihood."""
        return max(path.log_likelihood for path in self.paths)

    def log_likelihood(self, combine: Combine) -> float:
        """The bound: ``log sum exp`` over all paths, or the best of them."""
        if combine == "best":
            return self.best
        return self.best + math.log(math.fsum(math.exp(path.log_likelihood - self.best) for path in self.paths))


def count_chunks(boundary: np.ndarray) -> int:
    """Chunks that the core reads of a string."""
    return int(boundary.sum())


def greedy_detour(path: Path, data: bytes, first: int) -> bool | np.ndarray:
    """Whether greedy decoding writes a string, as far as one path can tell.

    Greedy decoding takes the likeliest (byte, bit) at each row; while its bits are the path's, the path's favourites
    are its choices.

    Args:
        path: an evaluated path.
        data: n - 1 bytes, the string without BOS.
        first: the first row whose choice counts.

    Returns:
        False where its first departure from the path is another byte, True where there is none. Else, where it
        is another bit, the path to ask next: with the favourites' bits from there on.
    """
    boundary = path.boundary
    rows = np.arange(first, len(data))
    bytes_, bits = path.favourites[rows] % 256, path.favourites[rows] >= 256
    other_byte = np.flatnonzero(bytes_ != np.frombuffer(data, dtype=np.uint8)[rows])
    other_bit = np.flatnonzero(bits[:-1] != boundary[rows[:-1] + 1])  # the last byte's bit is free
    if not len(other_bit):
        return not len(other_byte)
    if len(other_byte) and other_byte[0] <= other_bit[0]:
        return False
    detour = boundary.copy()
    detour[rows[other_bit[0] : -1] + 1] = bits[other_bit[0] : -1]
    return detour
