"""The fast implementations that a test can be run on, wherever it runs."""

from dataclasses import dataclass

import pytest
import torch

from bytekernels import dispatch


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

FAST = [
    pytest.param(NATIVE, id="native"),
    pytest.param(
        INTERPRETED,
        id="triton-interpreted",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU"),
    ),
    pytest.param(COMPILED, id="triton", marks=pytest.mark.gpu),
]


@pytest.fixture(params=FAST)
def fast(request) -> Fast:
    """Each fast implementation of an op that has native CPU code and Triton kernels."""
    return request.param
