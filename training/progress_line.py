"""What a person sees of a stage: a bar on a terminal, now and then a line in a file."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

PLAIN_SECONDS = 30.0  # between lines where stderr is no terminal
_BAR_COLUMNS = 10
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class ProgressLine:
    """One line about a stage: title, percent, losses, rates, time left.

    On a terminal it is a bar that is redrawn in place and never wider than the terminal: what does not fit is left out,
    the least important first. Elsewhere (a cluster's log) it is a plain line, at most one in ``PLAIN_SECONDS``, and one
    at the end.

    Args:
        title: of the stage.
        stream: stderr if None.
        clock: seconds that only go forward.
    """

    def __init__(
        self, title: str, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title, self.stream, self.clock = title, stream or sys.stderr, clock
        self.fraction, self.values = 0.0, dict[str, float]()
        self._start: tuple[float, float] | None = None  # clock and fraction, when first moved
        self._printed_at, self._news = float("-inf"), False
        self._bar: tqdm | None = None
        if self.stream.isatty():
            form = "{desc} {bar} {n:3.0f}%{postfix}"
            self._bar = tqdm(total=100, desc=title, bar_format=form, dynamic_ncols=True, file=self.stream)

    def show(self, values: dict[str, float]) -> None:
        """Take new numbers."""
        self.values, self._news = values, True
        if self._bar is not None:
            columns = self._bar.format_dict["ncols"]
            room = None if columns is None else columns - len(f"{self.title} {_BAR_COLUMNS * ' '} 100%, ")
            self._bar.set_postfix_str(described(values, self._eta(), room), refresh=False)

    def move(self, fraction: float) -> None:
        """Come to a share in [0, 1] of the stage."""
        now = self.clock()
        self.fraction, self._news = min(1.0, fraction), True
        self._start = self._start or (now, self.fraction)
        if self._bar is not None:
            self._bar.update(100 * self.fraction - self._bar.n)
        elif now - self._printed_at >= PLAIN_SECONDS:
            self._print(now)

    def close(self) -> None:
        """Leave the last state standing."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._print(self.clock())

    def _eta(self) -> float | None:
        """Seconds left at the pace since this process's first step."""
        if self._start is None or not self._start[1] < self.fraction < 1:
            return None
        return (self.clock() - self._start[0]) * (1 - self.fraction) / (self.fraction - self._start[1])

    def _print(self, now: float) -> None:
        if self._news and self.values:
            words = described(self.values, self._eta())
            print(f"{self.title} {100 * self.fraction:3.0f}%, {words}", file=self.stream, flush=True)
            self._printed_at, self._news = now, False


def described(values: dict[str, float], eta: float | None = None, room: int | None = None) -> str:
    """Values as people read them, in at most ``room`` characters.

    Args:
        values: by the names of the log; those that are not known are losses.
        eta: seconds left.
        room: None for as many as it takes. Losses are kept longest, then the time left, the rate, lr, the norm, MFU,
            waiting and memory.
    """
    parts: list[tuple[int, str]] = []  # how soon it may go, words
    for name, value in values.items():
        if name == "skipped" and not value:
            continue
        if name in _FORMS:
            rank, words = _FORMS[name]
            parts.append((rank, words(value)))
        elif name != "bytes_per_second_per_device":
            parts.append((0, f"{name} {value:.4g}"))
    if eta is not None:
        parts.append((1, f"ETA {tqdm.format_interval(round(eta))}"))
    while room is not None and parts and len(_joined(parts)) > room:
        parts.remove(max(reversed(parts), key=lambda part: part[0]))
    return _joined(parts)


def _joined(parts: list[tuple[int, str]]) -> str:
    return "  ".join(words for _, words in parts)


def human(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: ``human(412_300, "B/s")`` is ``412 kB/s``."""
    for size, prefix in _UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


_FORMS: dict[str, tuple[int, Callable[[float], str]]] = {
    "skipped": (1, lambda value: f"skipped {value:.0f}"),
    "bytes_per_second": (2, lambda value: human(value, "B/s")),
    "lr": (3, lambda value: f"lr {value:.3g}"),
    "grad_norm": (4, lambda value: f"norm {value:.3g}"),
    "mfu": (5, lambda value: f"MFU {value:.1%}"),
    "data_wait": (6, lambda value: f"wait {value:.1%}"),
    "peak_memory_bytes": (7, lambda value: human(value, "B")),
}
