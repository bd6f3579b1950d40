"""What benchmarks are run on: shapes in letters, and batches that are cut into sequences."""

import argparse
import re
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from bytekernels.ragged import cu_seqlens_of


class Shape:
    """Base of a benchmark's frozen dataclass of whole numbers, whose names are letters.

    Attributes:
        T: bytes.
        S: sequences, their lengths drawn.
    """

    T: int
    S: int

    def __str__(self) -> str:
        return ",".join(f"{letter}={getattr(self, letter)}" for letter in self.letters())

    @classmethod
    def letters(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    def problem(self) -> str | None:
        """Why its numbers do not fit together, with the fix, or None."""
        if self.T < self.S:
            return f"T={self.T} bytes are too few for S={self.S} sequences: raise T or lower S"
        return None


S = TypeVar("S", bound=Shape)


def parse_shape(text: str, default: S) -> S:
    """``T=65536,D=512`` to a shape; a letter that is not given keeps the default's value.

    Raises:
        argparse.ArgumentTypeError: a letter that is unknown or given twice, or values that are no shape.
    """
    letters = default.letters()
    values: dict[str, int] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", item)
        if match is None or match[1] not in letters or match[1] in values or int(match[2]) < 1:
            example = ",".join(f"{letter}={getattr(default, letter)}" for letter in letters[:2])
            raise argparse.ArgumentTypeError(
                f"{item!r} in {text!r}: write each of {', '.join(letters)} at most once, as in {example}, with a "
                "whole number from 1"
            )
        values[match[1]] = int(match[2])
    shape = type(default)(**{letter: values.get(letter, getattr(default, letter)) for letter in letters})
    problem = shape.problem()
    if problem is not None:
        raise argparse.ArgumentTypeError(problem)
    return shape


def drawn_sequences(shape: Shape, generator: torch.Generator) -> Tensor:
    """``cu_seqlens`` of T bytes cut into S sequences, the longest up to three times the shortest."""
    shares = 0.5 + torch.rand(shape.S, generator=generator, device=generator.device)
    ends = (shares.cumsum(0) / shares.sum() * shape.T).round().to(torch.int32)
    ends[-1] = shape.T
    return cu_seqlens_of(ends.diff(prepend=ends.new_zeros(1)))
