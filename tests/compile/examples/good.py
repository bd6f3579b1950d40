"""Cases that the tool must pass: heuristics, absent arguments, helpers, sizes that are and are not specialised."""

import sys
from types import ModuleType

import torch
import triton
import triton.language as tl

LOCAL_BYTES: dict[str, int] = {}


def modules() -> list[ModuleType]:
    return [sys.modules[__name__]]


@triton.jit
def _halved(x):
    return x * 0.5


@triton.heuristics({"HAS_BIAS": lambda args: args["p_bias"] is not None})
@triton.jit(do_not_specialize=["rows"])
def halve_kernel(p_x, p_bias, p_y, rows, D: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        b_y = _halved(tl.load(p_x + i * D + o_d, mask=m_d, other=0.0).to(tl.float32))
        if HAS_BIAS:
            b_y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_y + i * D + o_d, b_y, mask=m_d)


@triton.jit
def count_kernel(p_count, n):
    tl.store(p_count, n)


@triton.jit
def product_kernel(p_a, p_b, p_c, BLOCK: tl.constexpr):
    o_row, o_column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    b_a = tl.load(p_a + o_row * BLOCK + o_column)
    b_b = tl.load(p_b + o_row * BLOCK + o_column)
    tl.store(p_c + o_row * BLOCK + o_column, tl.dot(b_a, b_b))


def _halve(dtype: torch.dtype, rows: int, bias: bool) -> None:
    x = torch.empty(rows, 100, dtype=dtype, device="meta")
    p_bias = torch.empty(100, dtype=dtype, device="meta") if bias else None
    halve_kernel[(rows,)](x, p_bias, torch.empty_like(x), rows, D=100, BLOCK=128, num_warps=2)


def _count(n: int) -> None:
    count_kernel[(1,)](torch.empty(1, dtype=torch.int64, device="meta"), n)


def _multiply(dtype: torch.dtype) -> None:
    a = torch.empty(128, 128, dtype=dtype, device="meta")
    product_kernel[(1,)](a, a, torch.empty_like(a), BLOCK=128, num_warps=8)


CASES = {
    "halve": {
        "bias": lambda dtype: _halve(dtype, 64, True),
        "bias, odd": lambda dtype: _halve(dtype, 63, True),
        "no bias": lambda dtype: _halve(dtype, 1, False),
    },
    "count": {
        "one": lambda dtype: _count(1),
        "sixteen": lambda dtype: _count(16),
        "odd": lambda dtype: _count(17),
        "odd again": lambda dtype: _count(19),
        "large": lambda dtype: _count(2**40 + 1),
    },
    "product": {"product": _multiply},
}
