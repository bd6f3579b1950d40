"""How bytes are drawn: settings of one sequence, and those of a batch as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import bytekernels
from bytekernels import BOS

FLOAT = torch.finfo(torch.float32)  # what settings are kept in for the draws


@dataclass(frozen=True)
class Sampling:
    """How the next (byte, bit) of a sequence is drawn.

    The pairs that ``top_k`` keeps are renormalised, then cut by ``top_p`` and ``min_p`` (:func:`bytekernels.sample`).

    Attributes:
        temperature: 0 takes the likeliest pair.
        top_k: draw among this many pairs; None for all.
        top_p: draw among the likeliest pairs that together reach this probability.
        min_p: draw among pairs at least this likely, as a share of the likeliest one's probability.
        repetition_penalty: positive logits of bytes that the prompt or the text has are divided by it, negative ones
            multiplied (Keskar et al. 2019, arXiv 1909.05858); 1 for none. Most texts repeat most bytes: rarely wise.
        seed: of the draws, any 64-bit integer. The same prompt, settings and seed give the same text.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= FLOAT.max:
            raise ValueError(f"temperature must be >= 0 and finite as a float32, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1 or None, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not FLOAT.tiny <= self.repetition_penalty <= FLOAT.max:
            raise ValueError(
                f"repetition_penalty must be > 0 and finite as a float32, got {self.repetition_penalty}: 1 is for none"
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be a 64-bit integer, got {self.seed}")


class Draws:
    """The settings of S slots, and how many numbers each has drawn.

    Attributes:
        settings: a :class:`Sampling` for each slot.
        counters: int64 [S], numbers drawn.
        seen: bool [S, 256], the bytes that each slot's text has; None where no slot has a repetition penalty.
    """

    def __init__(self, settings: Sequence[Sampling], device: torch.device) -> None:
        self.settings = list(settings)

        def column(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self._temperature = column([s.temperature for s in settings], torch.float32)
        self._top_k = column([min(s.top_k or 0, torch.iinfo(torch.int32).max) for s in settings], torch.int32)
        self._top_p = column([s.top_p for s in settings], torch.float32)
        self._min_p = column([s.min_p for s in settings], torch.float32)
        self._seeds = column([(s.seed + 2**63) % 2**64 - 2**63 for s in settings], torch.int64)
        self._penalty = column([s.repetition_penalty for s in settings], torch.float32)[:, None]
        self.counters = torch.zeros_like(self._seeds)
        penalised = any(s.repetition_penalty != 1 for s in settings)
        self.seen = torch.zeros(len(settings), 256, dtype=torch.bool, device=device) if penalised else None
        self._barred = torch.zeros(512, device=device)
        self._barred[[BOS, BOS + 256]] = -torch.inf

    def pairs(self, logits: Tensor, active: Tensor) -> Tensor:
        """Draw a byte, or a byte and its bit, from logits [S, 256] or [S, 512]: int64 [S]; BOS is never drawn."""
        halves = logits.shape[1] // 256
        logits = logits.float() + self._barred[: logits.shape[1]]
        if self.seen is not None:
            penalised = torch.where(logits > 0, logits / self._penalty, logits * self._penalty)
            logits = torch.where(self.seen.repeat(1, halves), penalised, logits)
        return self.index(logits, active)

    def index(self, logits: Tensor, active: Tensor) -> Tensor:
        """Draw a column of logits [S, V] for each slot, int64 [S]; only the active ones' numbers are used up."""
        drawn = bytekernels.sample(
            logits,
            self._seeds,
            self.counters,
            temperature=self._temperature,
            top_k=self._top_k,
            top_p=self._top_p,
            min_p=self._min_p,
        )
        self.counters += active
        return drawn

    def saw(self, byte: Tensor, active: Tensor) -> None:
        """Note the byte (uint8 [S]) of each active slot."""
        if self.seen is not None:
            slots = torch.arange(len(self.settings), device=byte.device)
            self.seen[slots, byte.long()] |= active
