"""The scan and its backward, of the models' sizes and of small ones."""

from dataclasses import dataclass
from functools import partial

import torch

from bytekernels.ssd import triton as ssd
from bytekernels.ssd.triton.call import SEGMENT
from rooms.batch import EVEN, ODD, Batch, Case, empty


@dataclass(frozen=True)
class Size:
    """H heads of P in G groups, N values of state."""

    heads: int
    headdim: int
    d_state: int
    groups: int

    def __str__(self) -> str:
        return f"H={self.heads},P={self.headdim},N={self.d_state},G={self.groups}"


MODEL = Size(heads=48, headdim=64, d_state=128, groups=1)
MIDDLE = Size(heads=8, headdim=64, d_state=64, groups=1)
SMALL = Size(heads=4, headdim=32, d_state=16, groups=2)
LONG = Batch(bytes=16 * SEGMENT, chunks=1, sequences=16)


def _scan(size: Size, batch: Batch, options: bool, dtype: torch.dtype) -> None:
    """The scan and its backward, with all options or the models' own; with all, x, B, C, dt and z side by side."""
    rows, fp32 = (size.heads, size.headdim), torch.float32
    outer = (size.groups, size.d_state)
    if options:
        inner, channels = size.heads * size.headdim, size.groups * size.d_state
        wide = empty(batch.bytes, 2 * inner + 2 * channels + size.heads, dtype=dtype)
        z, x, B, C, dt = wide.split([inner, inner, channels, channels, size.heads], 1)
        x, z, B, C = x.unflatten(1, rows), z.unflatten(1, rows), B.unflatten(1, outer), C.unflatten(1, outer)
    else:
        x, z = (empty(batch.bytes, *rows, dtype=dtype) for _ in range(2))
        B, C = (empty(batch.bytes, *outer, dtype=dtype) for _ in range(2))
        dt = empty(batch.bytes, size.heads, dtype=dtype)
    A, D, bias = (empty(size.heads, dtype=fp32) for _ in range(3))
    initial = empty(batch.sequences, *rows, size.d_state, dtype=fp32) if options else None
    inputs = (x, dt, A, B, C, batch.cu(), D, z if options else None, bias, True, 0.0, float("inf"), initial)
    y, final_states = ssd.ssd_scan(*inputs)
    ssd.ssd_scan_backward(y, final_states, *inputs)


CASES: dict[str, Case] = {
    str(MODEL): partial(_scan, MODEL, EVEN, False),
    f"{MODEL} long": partial(_scan, MODEL, LONG, False),
    f"{MODEL} all": partial(_scan, MODEL, EVEN, True),
    str(MIDDLE): partial(_scan, MIDDLE, EVEN, False),
    f"{SMALL} all long": partial(_scan, SMALL, LONG, True),
    f"{SMALL} all": partial(_scan, SMALL, EVEN, True),
    f"{SMALL} all odd": partial(_scan, SMALL, ODD, True),
}
