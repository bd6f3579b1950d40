"""The norms, with a residual and after the gate."""

from functools import partial

import torch
from torch import Tensor

from bytekernels.norm import triton as norm
from rooms.batch import Batch, Case, at_widths, empty

WIDTHS = (16, 512, 1536, 3072, 8192, 1000)  # whole and padded blocks; rows that begin at no multiple of 16
GROUPED = (512, 3072, 8192, 1000)  # of which groups are normalised too
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


def _cases(width: int, batch: Batch) -> dict[str, Case]:
    columns = 2 * width + 280  # a row of in_proj's output for 24 heads, N = 128 and G = 1: a multiple of 8, not of 16
    cases: dict[str, Case] = {
        "rms": partial(_rms, width, batch.bytes, False),
        "rms with fp32 residual": partial(_rms, width, batch.bytes, True),
        "gated": partial(_gated, width, batch.bytes, width, columns),
    }
    if width in GROUPED:
        cases["gated in 8 groups"] = partial(_gated, width, batch.bytes, width // 8, columns)
    return cases


CASES: dict[str, Case] = at_widths(_cases, WIDTHS)
