"""Cases that the tool must fail: spills, too much shared memory, an error in a kernel, a kernel that none launches."""

import sys
from types import ModuleType

import torch
import triton
import triton.language as tl

LOCAL_BYTES = {"bad.crowded_kernel": 1 << 20}


def modules() -> list[ModuleType]:
    return [sys.modules[__name__]]


@triton.jit
def crowded_kernel(p_x, BLOCK: tl.constexpr):
    """Holds its row in registers until the largest is known."""
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x).to(tl.float32)
    tl.store(p_x + o_x, b_x - tl.max(b_x, 0))


@triton.jit
def staged_kernel(p_a, p_b, p_c, length, BLOCK: tl.constexpr):
    """Loads as many blocks ahead as there are stages."""
    o_row, o_column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    b_c = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for i in range(0, length, BLOCK):
        b_a = tl.load(p_a + o_row * length + i + o_column)
        b_b = tl.load(p_b + (i + o_row) * BLOCK + o_column)
        b_c = tl.dot(b_a, b_b, b_c)
    tl.store(p_c + o_row * BLOCK + o_column, b_c)


@triton.jit
def mistaken_kernel(p_x):
    tl.store(p_x + tl.arange(0, 16), tl.arange(0, 32))


@triton.jit
def forgotten_kernel(p_x):
    tl.store(p_x, 0)


def _crowd(dtype: torch.dtype) -> None:
    x = torch.empty(2048, dtype=dtype, device="meta")
    crowded_kernel[(1,)](x, BLOCK=2048, num_warps=1, maxnreg=32)


def _stage(dtype: torch.dtype) -> None:
    a, b = torch.empty(128, 4096, dtype=dtype, device="meta"), torch.empty(4096, 128, dtype=dtype, device="meta")
    c = torch.empty(128, 128, dtype=torch.float32, device="meta")
    staged_kernel[(1,)](a, b, c, 4096, BLOCK=128, num_warps=8, num_stages=6)


def _mistake(dtype: torch.dtype) -> None:
    mistaken_kernel[(1,)](torch.empty(32, dtype=dtype, device="meta"))


CASES = {"bad": {"crowded": _crowd, "staged": _stage, "mistaken": _mistake}}
