"""The norms in Triton.

A program takes whole rows, or whole groups of rows, a block at a time, and keeps the weight. With h what is
normalised and r = 1 / sqrt(mean(h^2) + eps): ``y = h r weight``, ``dh = r (g - h r^2 mean(g h))`` with
``g = dy weight``, ``dweight = sum over rows of dy h r``. Nothing is saved forward: the backward pass finds r again from
what it reads. Each of its programs leaves its rows' part of dweight, and one more launch adds the parts in their order.

``maxnreg`` stands where ptxas, left to itself, spills a few bytes of some width to fit one more block on a chip.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bytekernels.launch import on_device, sum_parts

BLOCK = 2048  # elements that a program holds of one operand, where whole rows allow: 16 a thread at 4 warps
FORWARD = 4096, 16  # programs that share the rows, and the rows that one of them takes at most
BACKWARD = 512, 256  # so parts of dweight take 1.6 % of bfloat16 x's traffic, or are few enough to stay in the L2 cache


def _unit(*strides: str) -> Any:
    """A heuristic: the power of two up to 8 that divides these strides, so that rows are read in vectors."""
    return lambda args: math.gcd(8, *(args[stride] for stride in strides))


@triton.jit
def _at(p_rows, o_r, o_d, stride, UNIT: tl.constexpr):
    """Pointers to columns o_d of rows o_r."""
    return p_rows + o_r[:, None] * (stride // UNIT * UNIT) + o_d


@triton.jit
def _scale(b_h, m_r, eps, SIZE: tl.constexpr):
    """r = 1 / sqrt(mean(h^2) + eps) of each row [BLOCK_R, 1], 0 where there is no row."""
    return tl.where(m_r, tl.rsqrt(tl.sum(b_h * b_h, 1) / SIZE + eps), 0.0)[:, None]


@triton.jit
def _through_scale(b_dy, b_h, b_weight, b_scale, SIZE: tl.constexpr):
    """dh = r (g - h r^2 mean(g h)) with g = dy weight."""
    b_g = b_dy * b_weight
    b_along = tl.sum(b_g * b_h, 1)[:, None] * (b_scale * b_scale / SIZE)
    return b_scale * (b_g - b_h * b_along)


@triton.jit
def _load_sum(
    p_x, p_residual, o_r, o_d, mask, stride_x, stride_residual, HAS_RESIDUAL: tl.constexpr, UNIT: tl.constexpr
):
    """x, or x + residual, rounded to the dtype that the sum is kept in."""
    b_x = tl.load(_at(p_x, o_r, o_d, stride_x, UNIT), mask=mask, other=0.0)
    if HAS_RESIDUAL:
        b_residual = tl.load(_at(p_residual, o_r, o_d, stride_residual, UNIT), mask=mask, other=0.0)
        b_sum = b_x.to(b_residual.dtype).to(tl.float32) + b_residual.to(tl.float32)
        return b_sum.to(b_residual.dtype).to(tl.float32)
    return b_x.to(tl.float32)


@triton.heuristics(
    {"HAS_RESIDUAL": lambda args: args["p_residual"] is not None, "UNIT": _unit("stride_x", "stride_residual")}
)
@triton.jit(do_not_specialize=["rows", "share"])
def rms_norm_kernel(
    p_x,
    p_residual,
    p_weight,
    p_y,
    p_total,
    rows,
    share,
    stride_x,
    stride_residual,
    eps,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """total = x + residual, y = total / sqrt(mean(total^2) + eps) * weight."""
    o_first = tl.program_id(0).to(tl.int64) * share
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    for i in range(0, tl.minimum(share, rows - o_first), BLOCK_R):
        o_r = o_first + i + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        mask = m_r[:, None] & (o_d < D)
        b_h = _load_sum(p_x, p_residual, o_r, o_d, mask, stride_x, stride_residual, HAS_RESIDUAL, UNIT)
        if HAS_RESIDUAL:
            tl.store(p_total + o_r[:, None] * D + o_d, b_h, mask=mask)
        tl.store(p_y + o_r[:, None] * D + o_d, b_h * _scale(b_h, m_r, eps, D) * b_weight, mask=mask)


@triton.heuristics(
    {"HAS_RESIDUAL": lambda args: args["p_residual"] is not None, "UNIT": _unit("stride_x", "stride_residual")}
)
@triton.jit(do_not_specialize=["rows", "share"])
def rms_norm_backward_kernel(
    p_dy,
    p_dtotal,
    p_x,
    p_residual,
    p_weight,
    p_dx,
    p_dresidual,
    p_parts,
    rows,
    share,
    stride_x,
    stride_residual,
    eps,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx = dresidual = dtotal + dh, and this program's part of dweight = sum of dy h r."""
    i_part = tl.program_id(0).to(tl.int64)
    o_first = i_part * share
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for i in range(0, tl.minimum(share, rows - o_first), BLOCK_R):
        o_r = o_first + i + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        mask = m_r[:, None] & (o_d < D)
        b_h = _load_sum(p_x, p_residual, o_r, o_d, mask, stride_x, stride_residual, HAS_RESIDUAL, UNIT)
        b_dy = tl.load(p_dy + o_r[:, None] * D + o_d, mask=mask, other=0.0).to(tl.float32)
        b_scale = _scale(b_h, m_r, eps, D)
        b_dweight += b_dy * (b_h * b_scale)
        b_dh = _through_scale(b_dy, b_h, b_weight, b_scale, D)
        if HAS_RESIDUAL:
            b_dh += tl.load(p_dtotal + o_r[:, None] * D + o_d, mask=mask, other=0.0).to(tl.float32)
            tl.store(p_dresidual + o_r[:, None] * D + o_d, b_dh, mask=mask)
        tl.store(p_dx + o_r[:, None] * D + o_d, b_dh, mask=mask)
    tl.store(p_parts + i_part * D + o_d, tl.sum(b_dweight, 0)[None, :], mask=o_d < D)


@triton.heuristics({"HAS_ACTIVE": lambda args: args["p_active"] is not None, "UNIT": _unit("stride_y", "stride_z")})
@triton.jit(do_not_specialize=["rows", "share"])
def gated_rms_norm_kernel(
    p_y,
    p_z,
    p_weight,
    p_active,
    p_out,
    rows,
    share,
    stride_y,
    stride_z,
    eps,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h = y silu(z), out = h / sqrt(mean(h^2) + eps) * weight over the SIZE columns of a group; 0 where not active."""
    o_first = (tl.program_id(0) // (D // SIZE)).to(tl.int64) * share
    o_size = tl.arange(0, BLOCK_D)[None, :]
    o_d = tl.program_id(0) % (D // SIZE) * SIZE + o_size
    b_weight = tl.load(p_weight + o_d, mask=o_size < SIZE, other=0.0).to(tl.float32)
    for i in range(0, tl.minimum(share, rows - o_first), BLOCK_R):
        o_r = o_first + i + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        mask = m_r[:, None] & (o_size < SIZE)
        m_read = mask
        if HAS_ACTIVE:
            m_r &= tl.load(p_active + o_r, mask=m_r, other=0) != 0
            m_read &= m_r[:, None]
        b_y = tl.load(_at(p_y, o_r, o_d, stride_y, UNIT), mask=m_read, other=0.0).to(tl.float32)
        b_z = tl.load(_at(p_z, o_r, o_d, stride_z, UNIT), mask=m_read, other=0.0).to(tl.float32)
        b_h = b_y * (b_z * tl.sigmoid(b_z))
        tl.store(p_out + o_r[:, None] * D + o_d, b_h * _scale(b_h, m_r, eps, SIZE) * b_weight, mask=mask)


@triton.heuristics({"UNIT": _unit("stride_y", "stride_z", "stride_dz")})
@triton.jit(do_not_specialize=["rows", "share"])
def gated_rms_norm_backward_kernel(
    p_dout,
    p_y,
    p_z,
    p_weight,
    p_dy,
    p_dz,
    p_parts,
    rows,
    share,
    stride_y,
    stride_z,
    stride_dz,
    eps,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dy = dh silu(z), dz = dh y sigmoid(z) (1 + z (1 - sigmoid(z))), and this program's part of dweight."""
    i_part = (tl.program_id(0) // (D // SIZE)).to(tl.int64)
    o_first = i_part * share
    o_size = tl.arange(0, BLOCK_D)[None, :]
    o_d = tl.program_id(0) % (D // SIZE) * SIZE + o_size
    b_weight = tl.load(p_weight + o_d, mask=o_size < SIZE, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for i in range(0, tl.minimum(share, rows - o_first), BLOCK_R):
        o_r = o_first + i + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        mask = m_r[:, None] & (o_size < SIZE)
        b_y = tl.load(_at(p_y, o_r, o_d, stride_y, UNIT), mask=mask, other=0.0).to(tl.float32)
        b_z = tl.load(_at(p_z, o_r, o_d, stride_z, UNIT), mask=mask, other=0.0).to(tl.float32)
        b_dout = tl.load(p_dout + o_r[:, None] * D + o_d, mask=mask, other=0.0).to(tl.float32)
        b_open = tl.sigmoid(b_z)
        b_gate = b_z * b_open
        b_slope = b_y * (b_open + b_gate * (1.0 - b_open))  # dh/dz
        b_h = b_y * b_gate
        b_scale = _scale(b_h, m_r, eps, SIZE)
        b_dweight += b_dout * (b_h * b_scale)
        b_dh = _through_scale(b_dout, b_h, b_weight, b_scale, SIZE)
        tl.store(p_dy + o_r[:, None] * D + o_d, b_dh * b_gate, mask=mask)
        tl.store(_at(p_dz, o_r, o_d, stride_dz, UNIT), b_dh * b_slope, mask=mask)
    tl.store(p_parts + i_part * D + o_d, tl.sum(b_dweight, 0)[None, :], mask=o_size < SIZE)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _forward(x, None, weight, None, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual.new_empty(residual.shape)
    return _forward(x, residual, weight, total, eps), total


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    return _backward(dy, None, x, None, weight, eps)


def add_rms_norm_backward(
    dy: Tensor, dtotal: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> list[Tensor]:
    return _backward(dy, dtotal, x, residual, weight, eps)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, *, active: Tensor | None = None
) -> Tensor:
    """As the reference; rows that are not active, bool [T], are not read and give zeros."""
    out = y.new_empty(y.shape)
    rows_y, rows_z = _rows(y), _rows(z)
    rows, width = rows_y.shape
    share, options = _blocks(rows, group_size, *FORWARD)
    if options["BLOCK_R"] == 1:
        options["maxnreg"] = 64
    with on_device(y):
        if rows and width:
            gated_rms_norm_kernel[(triton.cdiv(rows, share) * (width // group_size),)](
                rows_y,
                rows_z,
                weight.contiguous(),
                active,
                out,
                rows,
                share,
                rows_y.stride(0),
                rows_z.stride(0),
                eps,
                D=width,
                SIZE=group_size,
                **options,
            )
    return out


def gated_rms_norm_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float, *, dz: Tensor | None = None
) -> list[Tensor]:
    """As the reference; dz is written where it is given: [..., D] with rows as in a slice of columns."""
    dy, dz = y.new_empty(y.shape), z.new_empty(z.shape) if dz is None else dz
    rows_y, rows_z, rows_dz = _rows(y), _rows(z), _rows(dz)
    if rows_dz.data_ptr() != dz.data_ptr():
        raise ValueError(f"dz must have dense rows at one stride, got strides {dz.stride()} for shape {list(dz.shape)}")
    rows, width = rows_y.shape
    share, options = _blocks(rows, group_size, *BACKWARD)
    parts = y.new_empty(triton.cdiv(rows, share), width, dtype=torch.float32)
    with on_device(y):
        if rows and width:
            gated_rms_norm_backward_kernel[(len(parts) * (width // group_size),)](
                dout.contiguous(),
                rows_y,
                rows_z,
                weight.contiguous(),
                dy,
                rows_dz,
                parts,
                rows,
                share,
                rows_y.stride(0),
                rows_z.stride(0),
                rows_dz.stride(0),
                eps,
                D=width,
                SIZE=group_size,
                **options,
            )
        return [dy, dz, sum_parts(parts, weight.dtype)]


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor | None, eps: float) -> Tensor:
    y = x.new_empty(x.shape)
    rows_x, other = _rows(x), None if residual is None else _rows(residual)
    rows, width = rows_x.shape
    share, options = _blocks(rows, width, *FORWARD)
    with on_device(x):
        if rows and width:
            rms_norm_kernel[(triton.cdiv(rows, share),)](
                rows_x,
                other,
                weight.contiguous(),
                y,
                total,
                rows,
                share,
                rows_x.stride(0),
                0 if other is None else other.stride(0),
                eps,
                D=width,
                **options,
            )
    return y


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> list[Tensor]:
    dx, dresidual = x.new_empty(x.shape), None if residual is None else residual.new_empty(residual.shape)
    rows_x, other = _rows(x), None if residual is None else _rows(residual)
    rows, width = rows_x.shape
    share, options = _blocks(rows, width, *BACKWARD)
    parts = x.new_empty(triton.cdiv(rows, share), width, dtype=torch.float32)
    with on_device(x):
        if rows and width:
            rms_norm_backward_kernel[(len(parts),)](
                dy.contiguous(),
                None if dtotal is None else dtotal.contiguous(),
                rows_x,
                other,
                weight.contiguous(),
                dx,
                dresidual,
                parts,
                rows,
                share,
                rows_x.stride(0),
                0 if other is None else other.stride(0),
                eps,
                D=width,
                maxnreg=120,
                **options,
            )
        gradients = dx, dresidual, sum_parts(parts, weight.dtype)
    return [gradient for gradient in gradients if gradient is not None]


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D], copied where the rows are not dense or lie at no one stride."""
    x = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _blocks(rows: int, size: int, programs: int, most: int) -> tuple[int, dict[str, int]]:
    """Rows of a program, in whole blocks, at most ``most`` or a block; and how a block of rows of ``size`` is made."""
    block_d = triton.next_power_of_2(max(1, size))
    block_r = max(1, min(64, BLOCK // block_d))
    blocks = max(1, min(most // block_r, triton.next_power_of_2(triton.cdiv(rows, block_r * programs))))
    return blocks * block_r, {"BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": max(4, min(16, block_d // 512))}
