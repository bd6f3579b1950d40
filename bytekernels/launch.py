"""What the rooms' ``triton.py`` share: device helpers, block sizes, and the device that a launch goes to."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements that a program holds of one operand: 32 float32 registers a thread at 4 warps


def on_device(tensor: Tensor) -> Any:
    """The context in which kernels are launched on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def compute_capability(tensor: Tensor) -> int:
    """Of the chip that a launch for the tensor goes to: 90 for sm_90. 0 where kernels are interpreted."""
    if tensor.device.type == "cpu":
        return 0
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return 10 * major + minor
    return triton.runtime.driver.active.get_current_target().arch


def with_dense_rows(x: Tensor) -> Tensor:
    """x [T, ...] itself where the elements of each row lie together, at any row stride; else a copy."""
    return x if x[:1].is_contiguous() else x.contiguous()


def search_steps(entries: int) -> int:
    """Halvings after which :func:`first_at_or_after` has one of ``entries + 1`` answers left."""
    return entries.bit_length()


def whole_rows(width: int) -> tuple[int, int, int]:
    """(rows, padded width, warps) of a block of whole rows of ``width`` elements."""
    padded = triton.next_power_of_2(width)
    return max(1, min(128, BLOCK // padded)), padded, max(4, min(16, padded // 1024))


def row_pieces(width: int) -> tuple[int, int, dict[str, int]]:
    """(rows, columns, launch options) of a block of pieces of rows of ``width`` elements.

    A limit on registers that no kernel reaches keeps ptxas from spilling a few bytes to fit one more block on a chip.
    """
    columns = min(512, triton.next_power_of_2(width))
    return 8, columns, {"num_warps": max(1, min(8, columns // 64)), "maxnreg": 160}


@triton.jit
def first_at_or_after(p_values, entries, o_wanted, steps):
    """The first index in [0, entries] whose value is at least the wanted one; values do not decrease."""
    o_low = o_wanted * 0
    o_high = o_low + entries
    for _ in range(steps):
        o_middle = (o_low + o_high) // 2
        m_open = o_low < o_high
        m_below = tl.load(p_values + o_middle, mask=m_open, other=0) < o_wanted
        o_low = tl.where(m_open & m_below, o_middle + 1, o_low)
        o_high = tl.where(m_open & ~m_below, o_middle, o_high)
    return o_low


@triton.jit
def sequence_of_tile(p_cu, sequences, i_tile, steps, LENGTH: tl.constexpr):
    """The last sequence whose tiles begin at or before i_tile, those of sequence s beginning at cu[s] // LENGTH + s.

    That leaves each sequence the tiles of LENGTH rows that it needs: floor(b/L) - floor(a/L) + 1 >= ceil((b - a)/L).
    """
    i_low = i_tile * 0
    i_high = i_low + sequences
    for _ in range(steps):
        i_middle = (i_low + i_high + 1) // 2
        m_begun = tl.load(p_cu + i_middle) // LENGTH + i_middle <= i_tile
        i_low = tl.where(m_begun, i_middle, i_low)
        i_high = tl.where(m_begun, i_high, i_middle - 1)
    return i_low


@triton.jit(do_not_specialize=["parts", "length"])
def sum_parts_kernel(p_parts, p_sums, parts, length, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """sums[n] = sum of parts[:, n]: every BLOCK_P-th in order, then those sums as a tree."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for i in range(0, parts, BLOCK_P):
        o_p = i + tl.arange(0, BLOCK_P)
        m_pn = (o_p < parts)[:, None] & (o_n < length)[None, :]
        b_sum += tl.load(p_parts + o_p[:, None] * length.to(tl.int64) + o_n[None, :], mask=m_pn, other=0.0)
    tl.store(p_sums + o_n, tl.sum(b_sum, 0), mask=o_n < length)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first axis of float32 [P, N], in an order that P alone decides: [N] in the given dtype."""
    sums = parts.new_empty(parts.shape[1], dtype=dtype)
    if len(sums):
        grid = (triton.cdiv(len(sums), 32),)
        sum_parts_kernel[grid](parts, sums, parts.shape[0], parts.shape[1], BLOCK_P=64, BLOCK_N=32, num_warps=4)
    return sums
