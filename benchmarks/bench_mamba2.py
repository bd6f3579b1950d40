"""Speed and memory of Mamba2's kernels: ours, plain PyTorch in chunks, mamba-ssm's, flash-linear-attention's.

``python benchmarks/bench_mamba2.py [--shape T=8192,H=8] [--json FILE.json] [--plot FILE.png]``
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

import torch
from torch import Tensor

from benchmarks import command, mamba_peers, shapes
from benchmarks.harness import Case
from benchmarks.report import advantages
from bytekernels.mixer import roofline as mixer_roofline
from bytekernels.roofline import Work
from bytekernels.ssd import roofline as ssd_roofline


@dataclass(frozen=True)
class Shape(shapes.Shape):
    """What is mixed.

    Attributes:
        T: bytes.
        H: heads.
        P: channels of a head.
        N: state of a channel.
        G: groups of heads that share B and C.
        S: sequences, their lengths drawn; as many take a step together.
        K: taps of the convolution.
    """

    T: int
    H: int
    P: int = 64
    N: int = 128
    G: int = 1
    S: int = 16
    K: int = 4

    def problem(self) -> str | None:
        if self.H % self.G:
            return f"G={self.G} groups do not divide H={self.H} heads: change one of them"
        return super().problem()

    @property
    def inner(self) -> int:
        return self.H * self.P

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.inner + 2 * self.G * self.N


SHAPES = {"cpu": Shape(T=8192, H=8, P=64, N=64, S=4), "cuda": Shape(T=131072, H=48)}
QUICK_SHAPE = Shape(T=512, H=4, P=16, N=16, S=4)


def cases(ops: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Iterator[Case]:
    """The ops on random rows, with decay rates and time steps as Mamba2 begins with them.

    The truth is the scan in chunks of matrix products, in float64. The tests hold it to the specification, whose
    gradient would take hours here.
    """
    batch = _Batch(shape, dtype, device, seed)
    arguments: dict[str, Callable[[], dict[str, Any]]] = {
        "ssd": batch.of_scan,
        "mixer": batch.of_mixer,
        "step": batch.of_step,
    }
    for op in ops:
        case = Case(op, str(shape), dtype, arguments[op](), mamba_peers.TRUTH, work(op, shape, dtype))
        if op == "step":  # enough of them for the convolution to forget what it began with
            case = dataclasses.replace(case, updated=("conv", "ssm"), calls=shape.K + 1)
        elif op == "mixer" and dtype.itemsize < 4:  # its three parts hand each other rows in that dtype
            case = dataclasses.replace(case, chain=3)
        yield case


def work(op: str, shape: Shape, dtype: torch.dtype) -> dict[str, Work]:
    """The least that each pass must do."""
    sizes = (shape.H, shape.P, shape.N, shape.G)
    if op == "step":
        return {"forward": mixer_roofline.mamba2_mixer_step(shape.S, *sizes, shape.K, dtype)}
    if op == "ssd":
        scan = (shape.T, *sizes, shape.S, dtype)
        forward, backward = ssd_roofline.ssd_scan(*scan), ssd_roofline.ssd_scan_backward(*scan)
    else:
        mixer = (shape.T, *sizes, shape.K, shape.S, dtype)
        forward, backward = mixer_roofline.mamba2_mixer(*mixer), mixer_roofline.mamba2_mixer_backward(*mixer)
    return {"forward": forward, "backward": backward, "both": forward + backward}


class _Batch:
    """Random arguments of one shape and dtype."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.cu_seqlens = shapes.drawn_sequences(shape, self.generator)

    def of_scan(self) -> dict[str, Any]:
        shape = self.shape
        return dict(
            x=self._normal(shape.T, shape.H, shape.P).requires_grad_(),
            dt=self._normal(shape.T, shape.H).requires_grad_(),
            A=self._decay_rates().requires_grad_(),
            B=self._normal(shape.T, shape.G, shape.N).requires_grad_(),
            C=self._normal(shape.T, shape.G, shape.N).requires_grad_(),
            D=self._uniform(0.5, 1.5).requires_grad_(),
            dt_bias=self._step_sizes().requires_grad_(),
            cu_seqlens=self.cu_seqlens,
        )

    def of_mixer(self) -> dict[str, Any]:
        rows = self._normal(self.shape.T, self.shape.inner + self.shape.channels + self.shape.H)
        learned = {name: value.requires_grad_() for name, value in self._parameters().items()}
        return dict(zxbcdt=rows.requires_grad_(), **learned, cu_seqlens=self.cu_seqlens, **self._sizes())

    def of_step(self) -> dict[str, Any]:
        shape = self.shape
        return dict(
            zxbcdt=self._normal(shape.S, shape.inner + shape.channels + shape.H),
            **self._parameters(),
            conv=self._normal(shape.S, shape.channels, shape.K - 1).float(),
            ssm=self._random(shape.S, shape.H, shape.P, shape.N),
            **self._sizes(),
        )

    def _sizes(self) -> dict[str, int]:
        return dict(head_dim=self.shape.P, num_groups=self.shape.G)

    def _parameters(self) -> dict[str, Tensor]:
        shape = self.shape
        return dict(
            conv_weight=self._normal(shape.channels, shape.K, scale=shape.K**-0.5),
            conv_bias=self._normal(shape.channels, scale=0.1),
            A=self._decay_rates(),
            D=self._uniform(0.5, 1.5),
            dt_bias=self._step_sizes(),
            norm_weight=(1 + self._random(shape.inner, scale=0.1)).to(self.dtype),
        )

    def _random(self, *sizes: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(sizes, generator=self.generator, device=self.device)

    def _normal(self, *sizes: int, scale: float = 1.0) -> Tensor:
        return self._random(*sizes, scale=scale).to(self.dtype)

    def _uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.shape.H, generator=self.generator, device=self.device)

    def _decay_rates(self) -> Tensor:
        return -self._uniform(1.0, 16.0)

    def _step_sizes(self) -> Tensor:
        """The bias whose softplus is log-uniform in [1e-3, 1e-1]."""
        step = 10 ** self._uniform(-3.0, -1.0)
        return step + torch.log(-torch.expm1(-step))


def main(arguments: Sequence[str] | None = None) -> int:
    benchmark = command.Benchmark(
        prog="bench_mamba2.py",
        description=__doc__.splitlines()[0],
        letters="T bytes, H heads of P channels, state N, G groups, S sequences, K taps",
        shapes=SHAPES,
        quick_shape=QUICK_SHAPE,
        ops=mamba_peers.OPS,
        provider_names=mamba_peers.PROVIDERS,
        on_request=mamba_peers.ON_REQUEST,
        cases=cases,
        providers=mamba_peers.providers,
        paragraph=advantages,
        arithmetic=True,
    )
    return command.main(benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
