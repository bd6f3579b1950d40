"""The launches that `compile_check.py` compiles: for each room, calls of its launchers that between them make every
kernel in every configuration that the models use.

A case is called with a dtype and with tensors on the meta device: nothing is allocated or run, and a launcher that
would wait for the device fails. Hence the ``capacity``.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import bytekernels
from bytekernels.dechunk import triton as dechunk
from bytekernels.route import triton as route

Case = Callable[[torch.dtype], object]

WIDTHS = (16, 512, 2048, 3072)

# Bytes of local memory (each of stack, spill stores and spill loads) that a kernel may use on sm_80; elsewhere none.
SM80_LOCAL_BYTES: dict[str, int] = {}


@dataclass(frozen=True)
class Batch:
    """T bytes, M chunks and S sequences."""

    bytes: int
    chunks: int
    sequences: int

    def rows(self, width: int, dtype: torch.dtype) -> Tensor:
        return _empty(self.bytes, width, dtype=dtype)

    def flags(self) -> Tensor:
        return _empty(self.bytes, dtype=torch.bool)

    def cu(self) -> Tensor:
        return _empty(self.sequences + 1, dtype=torch.int32)

    def index(self) -> Tensor:
        return _empty(self.chunks, dtype=torch.int32)

    def chunk_of(self) -> Tensor:
        return _empty(self.bytes, dtype=torch.int32)


EVEN = Batch(bytes=4096, chunks=1024, sequences=16)
ODD = Batch(bytes=4095, chunks=1023, sequences=1)  # Triton specialises 1 and multiples of 16; sizes must not be


def modules() -> list[ModuleType]:
    """The modules of bytekernels that define Triton kernels."""
    (root,) = bytekernels.__path__
    paths = [path for path in sorted(Path(root).rglob("*.py")) if "@triton.jit" in path.read_text()]
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
    return [importlib.import_module(f"bytekernels.{name}") for name in names]


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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
    chunks = _empty(batch.chunks, width, dtype=dtype)
    layout = batch.chunk_of(), batch.index(), batch.cu()
    w = _empty(batch.chunks, dtype=torch.float32) if weight else None
    null = _empty(width, dtype=dtype) if options else None
    residual = batch.rows(width, residual_dtype or dtype) if options else None
    confidence = _empty(batch.bytes, dtype=torch.float32) if options else None
    u = dechunk.dechunk(chunks, *layout, w, null, residual, confidence)
    dechunk.dechunk_backward(u, chunks, *layout, w, null, confidence)


def _route_cases(width: int, batch: Batch) -> dict[str, Case]:
    return {
        "route": partial(_route, width, batch, True, True),
        "route starts": partial(_route, width, batch, False, False),
        "gather": partial(_gather, width, batch),
    }


def _dechunk_cases(width: int, batch: Batch) -> dict[str, Case]:
    return {
        "hold": partial(_dechunk, width, batch),
        "hold with all": partial(_dechunk, width, batch, options=True),
        "average": partial(_dechunk, width, batch, weight=True),
        "average with all": partial(_dechunk, width, batch, weight=True, options=True),
        "fp32 residual": partial(_dechunk, width, batch, weight=True, options=True, residual_dtype=torch.float32),
    }


def _at_widths(cases: Callable[[int, Batch], dict[str, Case]]) -> dict[str, Case]:
    named = {f"{name} D={width}": case for width in WIDTHS for name, case in cases(width, EVEN).items()}
    return named | {f"{name} D={WIDTHS[0]} odd": case for name, case in cases(WIDTHS[0], ODD).items()}


CASES: dict[str, dict[str, Case]] = {
    "route": {"layout": partial(_layout, EVEN), "layout odd": partial(_layout, ODD)} | _at_widths(_route_cases),
    "dechunk": _at_widths(_dechunk_cases),
}
