"""causal_conv1d, its backward, and its step; on rows, and on a table by byte value."""

from functools import partial

import torch
from torch import Tensor

from bytekernels.conv import triton as conv
from rooms.batch import EVEN, ODD, Batch, Case, empty

# Columns [first, first + channels) of rows: 48 heads of 64 and twice a state of 128 in in_proj's output; a small one.
COLUMNS = {"C=3328": (6448, 3072, 3328), "C=16": (16, 0, 16)}


def _columns(rows: int, columns: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    total, first, channels = columns
    return empty(rows, total, dtype=dtype)[:, first : first + channels]


def _conv(
    columns: tuple[int, int, int],
    batch: Batch,
    dtype: torch.dtype,
    *,
    taps: int = 4,
    silu: bool = True,
    states: bool = False,
    bias: bool = True,
) -> None:
    channels = columns[2]
    x = _columns(batch.bytes, columns, dtype)
    weight = empty(channels, taps, dtype=torch.float32)
    b = empty(channels, dtype=torch.float32) if bias else None
    initial = empty(batch.sequences, channels, taps - 1, dtype=dtype) if states else None
    y, final = conv.causal_conv1d(x, weight, b, batch.cu(), silu, initial)
    dx = _columns(batch.bytes, columns, dtype)
    conv.causal_conv1d_backward(y, final, x, weight, b, batch.cu(), silu, initial, dx=dx)


def _bytes(columns: tuple[int, int, int], batch: Batch, dtype: torch.dtype) -> None:
    table = _columns(256, columns, dtype)
    ids = empty(batch.bytes, dtype=torch.uint8)
    rest = empty(columns[2], 4, dtype=torch.float32), empty(columns[2], dtype=torch.float32), batch.cu(), True
    y = conv.byte_conv1d(ids, table, *rest)
    conv.byte_conv1d_backward(y, ids, table, *rest)


def _step(columns: tuple[int, int, int], dtype: torch.dtype) -> None:
    channels = columns[2]
    state = empty(EVEN.sequences, channels, 3, dtype=torch.float32)
    parameters = empty(channels, 4, dtype=torch.float32), empty(channels, dtype=torch.float32)
    conv.causal_conv1d_step(_columns(EVEN.sequences, columns, dtype), state, *parameters, True)


def _cases(columns: tuple[int, int, int], batch: Batch) -> dict[str, Case]:
    return {
        "conv": partial(_conv, columns, batch),
        "conv with states": partial(_conv, columns, batch, states=True),
        "bytes": partial(_bytes, columns, batch),
        "step": partial(_step, columns),
    }


CASES: dict[str, Case] = {
    f"{name} {width}": case for width, columns in COLUMNS.items() for name, case in _cases(columns, EVEN).items()
}
CASES |= {f"{name} C=16 odd": case for name, case in _cases(COLUMNS["C=16"], ODD).items()}
CASES |= {
    f"conv K={taps} C=16": partial(_conv, COLUMNS["C=16"], EVEN, taps=taps, silu=False, bias=False, states=True)
    for taps in (2, 3)
}
