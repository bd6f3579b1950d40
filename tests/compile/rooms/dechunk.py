"""dechunk, held and averaged."""

from functools import partial

import torch

from bytekernels.dechunk import triton as dechunk
from rooms.batch import Batch, Case, at_widths, empty


def _dechunk(
    width: int,
    batch: Batch,
    dtype: torch.dtype,
    *,
    weight: bool = False,
    options: bool = False,
    residual_dtype: torch.dtype | None = None,
) -> None:
    """dechunk and its backward, with a weight or held, with all other options or none."""
    chunks = empty(batch.chunks, width, dtype=dtype)
    layout = batch.chunk_of(), batch.index(), batch.cu()
    w = empty(batch.chunks, dtype=torch.float32) if weight else None
    null = empty(width, dtype=dtype) if options else None
    residual = batch.rows(width, residual_dtype or dtype) if options else None
    confidence = empty(batch.bytes, dtype=torch.float32) if options else None
    u = dechunk.dechunk(chunks, *layout, w, null, residual, confidence)
    dechunk.dechunk_backward(u, chunks, *layout, w, null, confidence)


def _cases(width: int, batch: Batch) -> dict[str, Case]:
    return {
        "hold": partial(_dechunk, width, batch),
        "hold with all": partial(_dechunk, width, batch, options=True),
        "average": partial(_dechunk, width, batch, weight=True),
        "average with all": partial(_dechunk, width, batch, weight=True, options=True),
        "fp32 residual": partial(_dechunk, width, batch, weight=True, options=True, residual_dtype=torch.float32),
    }


WIDTHS = (16, 512, 3072)
CASES: dict[str, Case] = at_widths(_cases, WIDTHS)
