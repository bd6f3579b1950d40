"""Speed and memory of linear_kl: ours, plain PyTorch, the same compiled, liger-kernel's fused linear JSD.

``python benchmarks/bench_linear_kl.py [--shape n=4096,V=128256] [--json FILE.json] [--plot FILE.png]``
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch
from torch import Tensor

from benchmarks import command, kl_peers, shapes
from benchmarks.harness import Case
from benchmarks.report import advantages
from bytekernels.linear_kl import roofline
from bytekernels.roofline import Work


@dataclass(frozen=True)
class Shape(shapes.Shape):
    """Whose divergence is taken.

    Attributes:
        n: rows.
        V: entries of the vocabulary.
        d: width of the student.
        e: width of the teacher.
    """

    n: int
    V: int
    d: int = 512
    e: int = 512

    def problem(self) -> str | None:
        return None


SHAPES = {"cpu": Shape(n=4096, V=128256), "cuda": Shape(n=8192, V=151936, d=2048, e=2048)}
QUICK_SHAPE = Shape(n=300, V=1000, d=16, e=24)


def cases(ops: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Iterator[Case]:
    """Both directions on random rows and heads, with logits of order 1.

    The truth is the specification, some rows at a time.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(rows, width, generator=generator, device=device)).to(dtype)

    arguments = dict(
        student_h=normal(shape.n, shape.d).requires_grad_(),
        student_W=normal(shape.V, shape.d, shape.d**-0.5).requires_grad_(),
        teacher_h=normal(shape.n, shape.e),
        teacher_W=normal(shape.V, shape.e, shape.e**-0.5),
    )
    rounded = 2 if dtype.itemsize < 4 else 1  # the logits and their gradient, in that dtype
    for op in ops:
        yield Case(op, str(shape), dtype, arguments, kl_peers.TRUTH, work(shape, dtype), chain=rounded)


def work(shape: Shape, dtype: torch.dtype) -> dict[str, Work]:
    """The least that each pass must do. A backward pass alone is none: gradients may be made with the loss."""
    sizes = (shape.n, shape.V, shape.d, shape.e, dtype)
    return {"forward": roofline.linear_kl(*sizes), "both": roofline.linear_kl_with_gradients(*sizes)}


def main(arguments: Sequence[str] | None = None) -> int:
    benchmark = command.Benchmark(
        prog="bench_linear_kl.py",
        description=__doc__.splitlines()[0],
        letters="n rows, V entries of the vocabulary, d and e the widths of student and teacher",
        shapes=SHAPES,
        quick_shape=QUICK_SHAPE,
        ops=kl_peers.OPS,
        provider_names=kl_peers.PROVIDERS,
        on_request=(),
        not_quick=("compile",),
        cases=cases,
        providers=kl_peers.providers,
        paragraph=advantages,
        arithmetic=True,
    )
    return command.main(benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
