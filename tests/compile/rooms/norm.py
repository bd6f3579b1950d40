"""The norms, with a residual and after the gate."""

from functools import partial

import torch
from torch import Tensor

from bytekernels.norm import triton as norm
from rooms.batch import Case, empty

WIDTHS = (16, 512, 1536, 2048, 3072, 4096, 8192)
ROWS, ODD_ROWS = 4096, 4095
EPS = 1e-5


def _rms(width: int, rows: int, residual: bool, dtype: torch.dtype) -> None:
    """rms_norm and its backward; the residual is carried in float32, as in the models."""
    x, weight = empty(rows, width, dtype=dtype), empty(width, dtype=torch.float32)
    if residual:
        other = empty(rows, width, dtype=torch.float32)
        y, total = norm.add_rms_norm(x, other, weight, EPS)
        norm.add_rms_norm_backward(y, total, x, other, weight, EPS)
    else:
        norm.rms_norm_backward(norm.rms_norm(x, weight, EPS), x, weight, EPS)


def _gated(width: int, rows: int, group_size: int, columns: int, dtype: torch.dtype) -> None:
    """gated_rms_norm and its backward, with z and dz the first columns of in_proj's output and of its gradient."""

    def first_columns() -> Tensor:
        return empty(rows, columns, dtype=dtype)[:, :width]

    y, weight = empty(rows, width, dtype=dtype), empty(width, dtype=torch.float32)
    out = norm.gated_rms_norm(y, first_columns(), weight, group_size, EPS)
    norm.gated_rms_norm_backward(out, y, first_columns(), weight, group_size, EPS, dz=first_columns())


def _cases(width: int, rows: int) -> dict[str, Case]:
    columns = 2 * width + 280  # a row of in_proj's output for 24 heads, N = 128 and G = 1: a multiple of 8, not of 16
    return {
        "rms": partial(_rms, width, rows, False),
        "rms with fp32 residual": partial(_rms, width, rows, True),
        "gated": partial(_gated, width, rows, width, columns),
        "gated in 8 groups": partial(_gated, width, rows, width // 8, columns),
    }


CASES: dict[str, Case] = {
    f"{name} D={width}": case for width in WIDTHS for name, case in _cases(width, ROWS).items()
} | {f"{name} D=1000 odd": case for name, case in _cases(1000, ODD_ROWS).items()}
