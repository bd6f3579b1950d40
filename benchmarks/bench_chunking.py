"""Speed and memory of route, gather and dechunk: ours, the plain PyTorch chain, the same compiled, mamba-ssm's scan.

``python benchmarks/bench_chunking.py [--shape T=65536,D=512] [--json FILE.json] [--plot FILE.png]``
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import command, harness, peers
from benchmarks.harness import Case
from benchmarks.report import Report, aligned
from bytekernels import Routing
from bytekernels.dechunk import roofline as dechunk_roofline
from bytekernels.ragged import cu_seqlens_of
from bytekernels.roofline import Work
from bytekernels.route import roofline as route_roofline


@dataclass(frozen=True)
class Shape:
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

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


SHAPES = {"cpu": Shape(T=65536, D=512), "cuda": Shape(T=131072, D=3072)}
QUICK_SHAPE = Shape(T=2048, D=64, S=4)


def parse_shape(text: str, default: Shape) -> Shape:
    """``T=65536,D=512`` to a shape; a letter that is not given keeps the default's value.

    Raises:
        argparse.ArgumentTypeError: a letter that is unknown or given twice, or a value that is no shape.
    """
    letters = [field.name for field in fields(Shape)]
    values: dict[str, int] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", item)
        if match is None or match[1] not in letters or match[1] in values or int(match[2]) < 1:
            raise argparse.ArgumentTypeError(
                f"{item!r} in {text!r}: write each of {', '.join(letters)} at most once, as in T=65536,D=512, with a "
                "whole number from 1"
            )
        values[match[1]] = int(match[2])
    shape = Shape(**{letter: values.get(letter, getattr(default, letter)) for letter in letters})
    if shape.T < shape.S:
        raise argparse.ArgumentTypeError(f"T={shape.T} bytes are too few for S={shape.S} sequences: raise T or lower S")
    return shape


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
        shares = 0.5 + self._random(shape.S)  # the longest sequence is up to three times the shortest
        ends = (shares.cumsum(0) / shares.sum() * shape.T).round().to(torch.int32)
        ends[-1] = shape.T
        self.cu_seqlens = cu_seqlens_of(ends.diff(prepend=ends.new_zeros(1)))
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
    parser = command.parser("bench_chunking.py", __doc__.splitlines()[0], peers.OPS, peers.PROVIDERS)
    defaults = "; ".join(f"{kind}: {shape}" for kind, shape in SHAPES.items())
    parser.add_argument(
        "--shape",
        metavar="T=65536,D=512",
        help=f"T bytes of width D, C bytes per chunk, S sequences (default: {defaults})",
    )
    options = parser.parse_args(arguments)
    device = options.device or command.default_device()
    shape = QUICK_SHAPE if options.quick else SHAPES[device.type]
    if options.shape:
        try:
            shape = parse_shape(options.shape, shape)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --shape: {error}")
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    names = options.provider or [name for name in peers.PROVIDERS if name not in peers.ON_REQUEST]
    if options.quick and not options.provider:
        names.remove("compile")
    print(f"{shape} in {dtype} on {device}", flush=True)
    report = harness.run(
        cases(options.op, shape, command.DTYPES[dtype], device),
        peers.providers(names, device),
        options.passes,
        device,
        harness.QUICK if options.quick else harness.Budget(),
    )
    return command.publish(report, options, sums(report))


if __name__ == "__main__":
    sys.exit(main())
