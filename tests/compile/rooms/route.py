"""route, its layout and the gather."""

from functools import partial

import torch

from bytekernels.route import triton as route
from rooms.batch import EVEN, ODD, Batch, Case, at_widths

WIDTHS = (16, 512, 2048, 3072)


def _route(width: int, batch: Batch, lookahead: bool, required: bool, dtype: torch.dtype) -> None:
    q, k = batch.rows(width, dtype), batch.rows(width, dtype)
    flags = batch.flags() if required else None
    prob, *_ = route.route(q, k, batch.cu(), flags, lookahead, batch.chunks)
    route.route_backward(torch.empty_like(prob), q, k, batch.cu(), lookahead)


def _layout(batch: Batch, dtype: torch.dtype) -> None:
    route.chunk_layout(batch.flags(), batch.cu(), batch.chunks)


def _gather(width: int, batch: Batch, dtype: torch.dtype) -> None:
    e = route.gather_chunks(batch.rows(width, dtype), batch.index(), batch.chunk_of())
    route.gather_chunks_backward(e, batch.index(), batch.chunk_of())


def _cases(width: int, batch: Batch) -> dict[str, Case]:
    return {
        "route": partial(_route, width, batch, True, True),
        "route starts": partial(_route, width, batch, False, False),
        "gather": partial(_gather, width, batch),
    }


CASES: dict[str, Case] = {"layout": partial(_layout, EVEN), "layout odd": partial(_layout, ODD)} | at_widths(
    _cases, WIDTHS
)
