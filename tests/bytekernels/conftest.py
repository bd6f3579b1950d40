"""The fast implementations that a test can be run on, wherever it runs, and what their tests share."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.testing import checked_pointers


@pytest.fixture(autouse=True, scope="session")
def every_pointer_is_checked():
    """Of Triton kernels, where they are interpreted."""
    with contextlib.nullcontext() if torch.cuda.is_available() else checked_pointers():
        yield


@dataclass(frozen=True)
class Fast:
    """An implementation by name, the device that it is tested on, and what it takes."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    examples: int  # that hypothesis may try: the interpreter takes a second for each

    @property
    def interpreted(self) -> bool:
        return (self.name, self.device) == ("triton", "cpu")

    def force(self):
        return dispatch.force(self.name)


NATIVE = Fast("native", "cpu", (torch.float32, torch.bfloat16), 60)
INTERPRETED = Fast("triton", "cpu", (torch.float32,), 12)
COMPILED = Fast("triton", "cuda", (torch.float32, torch.float16, torch.bfloat16), 60)

TRITON = [
    pytest.param(
        INTERPRETED,
        id="triton-interpreted",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU"),
    ),
    pytest.param(COMPILED, id="triton", marks=pytest.mark.gpu),
]
FAST = [pytest.param(NATIVE, id="native"), *TRITON]


@pytest.fixture(params=FAST)
def fast(request) -> Fast:
    """Each fast implementation of an op that has native CPU code and Triton kernels."""
    return request.param


@pytest.fixture(params=TRITON)
def in_triton(request) -> Fast:
    """Triton's kernels alone, interpreted or on a GPU."""
    return request.param


def wrong_tree(nodes: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Arrays of a tree's shapes whose numbers fit each other by accident alone: edges, children, string_ids."""
    extremes = torch.tensor([-(2**31), -1, 0, 1, 2, 3, nodes, nodes + 1, 97, 98, 256 + 97, 2**31 - 1]).int()
    sizes = (nodes, nodes + 1, nodes)
    edges, children, string_ids = (extremes[torch.randint(len(extremes), (n,), generator=generator)] for n in sizes)
    return edges, children, string_ids


def assert_repeats(fast: Fast, call: Callable[[], Iterable[Tensor]]) -> None:
    """Fail unless the call gives the same bits again, in native code for other numbers of threads too."""
    threads = torch.get_num_threads()
    try:
        first = list(call())
        for count in (1, 2, 5) if fast.name == "native" else (threads,):
            torch.set_num_threads(count)
            for i, (value, expected) in enumerate(zip(call(), first, strict=True)):
                assert torch.equal(value, expected), f"tensor {i} with {count} threads"
    finally:
        torch.set_num_threads(threads)


def far_apart(rows: Tensor, file: Path, stride: int = 2**30 + 16) -> Tensor:
    """A copy of rows [R, C] float32, contiguous in themselves, at a stride of which int32 holds one and not two.

    On the CPU the memory is that of a file with holes, which takes no room.
    """
    count, width = rows.shape
    size = (count - 1) * stride + width
    if rows.device.type == "cpu":
        memory = torch.from_file(str(file), shared=True, size=size)
    else:
        memory = torch.empty(size, device=rows.device)
    return memory.as_strided((count, width), (stride, 1)).copy_(rows.detach())
