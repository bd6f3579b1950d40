"""The norms through the extension: csrc/norm.h. Float32 and bfloat16 on the CPU."""

import torch
from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array, fresh, rows, threads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, (flat, narrow, sizes) = fresh(x), _plain(x, eps)
    _C.rms_norm(narrow, narrow, sizes, rows(flat), None, _wide(weight), array(y), None, threads())
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    flat, narrow, sizes = _plain(x, eps)
    dx, dweight = fresh(x), weight.new_empty(weight.shape, dtype=torch.float32)
    _C.rms_norm_backward(
        narrow,
        narrow,
        sizes,
        rows(flat),
        None,
        _wide(weight),
        array(dy.contiguous()),
        None,
        array(dx),
        None,
        array(dweight),
        threads(),
    )
    return [dx, dweight.to(weight.dtype)]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    flat, narrow, sizes = _plain(x, eps)
    other, narrow_residual, _ = _plain(residual, eps)
    y, total = fresh(x), fresh(residual)
    _C.rms_norm(
        narrow, narrow_residual, sizes, rows(flat), rows(other), _wide(weight), array(y), array(total), threads()
    )
    return y, total


def add_rms_norm_backward(
    dy: Tensor, dtotal: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> list[Tensor]:
    flat, narrow, sizes = _plain(x, eps)
    other, narrow_residual, _ = _plain(residual, eps)
    dx, dresidual = fresh(x), fresh(residual)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32)
    _C.rms_norm_backward(
        narrow,
        narrow_residual,
        sizes,
        rows(flat),
        rows(other),
        _wide(weight),
        array(dy.contiguous()),
        array(dtotal.contiguous()),
        array(dx),
        array(dresidual),
        array(dweight),
        threads(),
    )
    return [dx, dresidual, dweight.to(weight.dtype)]


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    flat, narrow, sizes = _plain(y, eps, group_size)
    gate, _, _ = _plain(z, eps)
    out = fresh(y)
    _C.gated_rms_norm(narrow, sizes, rows(flat), rows(gate), _wide(weight), array(out), threads())
    return out


def gated_rms_norm_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
) -> list[Tensor]:
    flat, narrow, sizes = _plain(y, eps, group_size)
    gate, _, _ = _plain(z, eps)
    dy, dz = fresh(y), fresh(z)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32)
    _C.gated_rms_norm_backward(
        narrow,
        sizes,
        rows(flat),
        rows(gate),
        _wide(weight),
        array(dout.contiguous()),
        array(dy),
        array(dz),
        array(dweight),
        threads(),
    )
    return [dy, dz, dweight.to(weight.dtype)]


def _plain(x: Tensor, eps: float, group_size: int | None = None) -> tuple[Tensor, bool, tuple[int, int, int, float]]:
    """x as rows, whether it is bfloat16, and the sizes that the extension takes."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    return flat, x.dtype == torch.bfloat16, (len(flat), width, group_size or width, eps)


def _wide(weight: Tensor) -> tuple[int, int, Tensor]:
    return array(weight.float().contiguous())
