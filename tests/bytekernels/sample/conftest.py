"""Rows of logits with settings of their own, and draws from them."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import bytekernels
from tests.bytekernels.conftest import FAST, Fast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REFERENCE = Fast("reference", "cpu", (*DTYPES, torch.float64), 60)


@pytest.fixture(params=[pytest.param(REFERENCE, id="reference"), *FAST])
def sampler(request) -> Fast:
    """Each implementation, the specification too."""
    return request.param


@dataclass
class Case:
    """Arguments of sample."""

    logits: Tensor
    seeds: Tensor
    counters: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())

    def draw(self, fast: Fast | None = None) -> Tensor:
        """On the implementation's device, back on the CPU."""
        logits, seeds, counters, *settings = (t if fast is None else t.to(fast.device) for t in self.tensors)
        names = ("temperature", "top_k", "top_p", "min_p")
        with (fast or REFERENCE).force():
            drawn = bytekernels.sample(logits, seeds, counters, **dict(zip(names, settings, strict=True)))
        return drawn.cpu()

    def rows(self, rows) -> "Case":
        return Case(*(tensor[rows] for tensor in self.tensors))

    def but(self, **changes) -> "Case":
        """With other values, a number for all rows."""
        values = {
            name: value if isinstance(value, Tensor) else torch.full_like(vars(self)[name], value)
            for name, value in changes.items()
        }
        return replace(self, **values)


def make(rows, vocabulary=19, dtype=torch.float32, *, seed=0, spread=3.0) -> Case:
    """Random rows with ties and -inf, whose settings are each off in a third of the rows."""
    generator = torch.Generator().manual_seed(seed)

    def share(power=1):
        """In [0, 1)."""
        return torch.rand(rows, generator=generator) ** power

    def where_on(values, off):
        return torch.where(share() < 1 / 3, torch.as_tensor(off, dtype=values.dtype), values)

    logits = spread * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, 1::4] = logits[:, 1::4].round()
    logits[:, 1:][torch.rand(rows, vocabulary - 1, generator=generator) < 0.1] = -torch.inf
    return Case(
        logits.to(dtype),
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        where_on(3 * share(), 0.0),
        where_on(torch.randint(1, vocabulary + 3, (rows,), generator=generator, dtype=torch.int32), 0),
        where_on(share(), 1.0),
        where_on(share(3), 0.0),
    )


def plain(logits, draws, seed=7) -> Case:
    """So many draws from one row of logits, at temperature 1 and without limits."""
    row, zeros, ones = torch.tensor(logits, dtype=torch.float32), torch.zeros(draws), torch.ones(draws)
    counters = torch.arange(draws)
    return Case(row.repeat(draws, 1), torch.full_like(counters, seed), counters, ones, zeros.int(), ones, zeros)
