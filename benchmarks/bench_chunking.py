"""Speed and memory of route, gather and dechunk: ours, the plain PyTorch chain, the same compiled, mamba-ssm's scan.

``python benchmarks/bench_chunking.py [--shape T=65536,D=512] [--json FILE.json] [--plot FILE.png]``
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import command, peers, shapes
from benchmarks.harness import Case
from benchmarks.report import Report, aligned
from bytekernels import Routing
from bytekernels.dechunk import roofline as dechunk_roofline
from bytekernels.roofline import Work
from bytekernels.route import roofline as route_roofline


@dataclass(frozen=True)
class Shape(shapes.Shape):
    """What is chunked.

    Attributes:
        T: bytes.
        D: width of a row.
        C: bytes per chunk, on average.
        S: sequences, their lengths drawn.
    """

    T: int
    D: int
    C: int = 5
    S: int = 16


SHAPES = {"cpu": Shape(T=65536, D=512), "cuda": Shape(T=131072, D=3072)}
QUICK_SHAPE = Shape(T=2048, D=64, S=4)


def cases(ops: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Iterator[Case]:
    """The ops on one batch of random bytes.

    q[t] and k[t+1] are at an angle whose cosine is 0.2 to 0.95, or minus that where a chunk is to end, so that in any
    dtype a boundary is a boundary. ``gather`` and ``dechunk`` are given their routing; in ``roundtrip`` the chunks go
    from one to the other as they are, and the weights and the confidence are the routing's probabilities.
    """
    batch = _Batch(shape, dtype, device, seed)
    arguments: dict[str, Callable[[], dict[str, Any]]] = {
        "route": lambda: dict(q=batch.q, k=batch.k, cu_seqlens=batch.cu_seqlens),
        "gather": lambda: dict(h=batch.normal(shape.T), routing=batch.routing),
        "dechunk": lambda: dict(
            chunks=batch.normal(batch.chunks),
            routing=batch.routing,
            weight=batch.uniform(batch.chunks, 0.5),
            null=batch.null,
            residual=batch.normal(shape.T),
            confidence=batch.uniform(shape.T, 0.5),
        ),
        "roundtrip": lambda: dict(
            q=batch.q,
            k=batch.k,
            h=batch.normal(shape.T),
            null=batch.null,
            residual=batch.normal(shape.T),
            cu_seqlens=batch.cu_seqlens,
        ),
    }
    for op in ops:
        yield Case(op, str(shape), dtype, arguments[op](), peers.REFERENCE, work(op, shape, batch.chunks, dtype))


def work(op: str, shape: Shape, chunks: int, dtype: torch.dtype) -> dict[str, Work]:
    """The least that each pass must do. The round trip's is the sum: between its halves the core runs."""
    of = (shape.T, shape.D, chunks, shape.S, dtype)
    forward = {
        "route": route_roofline.route(*of),
        "gather": route_roofline.gather_chunks(*of),
        "dechunk": dechunk_roofline.dechunk(*of),
    }
    backward = {
        "route": route_roofline.route_backward(*of),
        "gather": route_roofline.gather_chunks_backward(*of),
        "dechunk": dechunk_roofline.dechunk_backward(*of),
    }
    parts = list(forward) if op == "roundtrip" else [op]
    nothing = Work(0, 0)
    there, back = (sum((side[part] for part in parts), nothing) for side in (forward, backward))
    return {"forward": there, "backward": back, "both": there + back}


class _Batch:
    """Random arguments of one shape and dtype."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.cu_seqlens = shapes.drawn_sequences(shape, self.generator)
        self.q, self.k = self._pairs()
        self.null = self.normal(1).detach().flatten().requires_grad_()
        self.routing = self._routing()
        self.chunks = len(self.routing.index)

    def normal(self, rows: int) -> Tensor:
        """[rows, D] from a normal distribution, to be differentiated."""
        return self._normal(rows).to(self.dtype).requires_grad_()

    def uniform(self, count: int, low: float) -> Tensor:
        """float32 [count] between low and 1, to be differentiated."""
        return (low + (1 - low) * self._random(count)).requires_grad_()

    def _random(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator, device=self.device)

    def _normal(self, rows: int) -> Tensor:
        return torch.randn(rows, self.shape.D, generator=self.generator, device=self.device)

    def _pairs(self) -> tuple[Tensor, Tensor]:
        cosine = 0.2 + 0.75 * self._random(self.shape.T)
        cosine = torch.where(self._random(self.shape.T) < 1 / self.shape.C, -cosine, cosine)[:, None]
        q, noise = self._normal(self.shape.T), self._normal(self.shape.T)
        along = F.normalize(q, dim=-1)
        across = F.normalize(noise - (noise * along).sum(-1, keepdim=True) * along, dim=-1)
        k = self.shape.D**0.5 * (cosine * along + (1 - cosine.square()).sqrt() * across)
        return q.to(self.dtype).requires_grad_(), k.roll(1, 0).to(self.dtype).requires_grad_()

    def _routing(self) -> Routing:
        with torch.no_grad(), peers.REFERENCE.settings():
            return Routing(**peers.our_route(self.q.double(), self.k.double(), self.cu_seqlens))


def sums(report: Report) -> str:
    """route and gather, which hand the core its rows together: the sum of their medians."""
    medians = {(row["op"], row["pass"], row["provider"]): row["median_ms"] for row in report.rows}
    cells = [["ops", "pass", "provider", "sum of medians, ms", "speed-up"]]
    for op, which, provider in medians:
        if op == "route" and ("gather", which, provider) in medians:
            both, eager = (
                sum(medians.get((part, which, name), float("nan")) for part in ("route", "gather"))
                for name in (provider, "eager")
            )
            speed_up = "" if eager != eager else f"{eager / both:.2f}x"
            cells.append(["route+gather", which, provider, f"{both:.3f}", speed_up])
    return "\n".join(aligned(cells, left=3)) if len(cells) > 1 else ""


def main(arguments: Sequence[str] | None = None) -> int:
    benchmark = command.Benchmark(
        prog="bench_chunking.py",
        description=__doc__.splitlines()[0],
        letters="T bytes of width D, C bytes per chunk, S sequences",
        shapes=SHAPES,
        quick_shape=QUICK_SHAPE,
        ops=peers.OPS,
        provider_names=peers.PROVIDERS,
        on_request=peers.ON_REQUEST,
        not_quick=("compile",),
        cases=cases,
        providers=peers.providers,
        paragraph=sums,
    )
    return command.main(benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
