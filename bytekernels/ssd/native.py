"""The scan through the extension: csrc/ssd.h. Float32 and bfloat16 on the CPU."""

import torch
from torch import Tensor

from bytekernels import _C
from bytekernels.extension import array, fresh, rows, threads


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    arguments = _arguments(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_states)
    sizes = (*x.shape, *B.shape[1:])
    y = fresh(x)
    final_states = fresh(x, (len(cu_seqlens) - 1, *x.shape[1:], B.shape[2]), torch.float32)
    narrow = x.dtype == torch.bfloat16
    _C.ssd_scan(narrow, sizes, array(cu_seqlens.contiguous()), arguments, array(y), array(final_states), threads())
    return y, final_states


def ssd_scan_backward(
    dy: Tensor,
    dfinal_states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_states: Tensor | None,
) -> list[Tensor]:
    arguments = _arguments(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_states)
    wide = torch.float32
    gradients = [  # of the inputs in their order; those of float32 parameters are cast afterwards
        (x, x.dtype),
        (dt, wide),
        (A, wide),
        (B, x.dtype),
        (C, x.dtype),
        (D, wide),
        (z, x.dtype),
        (dt_bias, wide),
        (initial_states, wide),
    ]
    outputs = [None if value is None else fresh(value, dtype=dtype) for value, dtype in gradients]
    _C.ssd_scan_backward(
        x.dtype == torch.bfloat16,
        (*x.shape, *B.shape[1:]),
        array(cu_seqlens.contiguous()),
        arguments,
        array(dy.to(x.dtype).contiguous()),
        array(dfinal_states.float().contiguous()),
        tuple(None if output is None else array(output) for output in outputs),
        threads(),
    )
    return [
        output.to(value.dtype)
        for output, (value, _) in zip(outputs, gradients, strict=True)
        if output is not None and value is not None
    ]


def _arguments(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    initial_states: Tensor | None,
) -> tuple[object, ...]:
    def wide(value: Tensor | None) -> tuple[int, int, Tensor] | None:
        return None if value is None else array(value.float().contiguous())

    gate = None if z is None else rows(z)
    return (
        rows(x),
        rows(dt.float()),
        wide(A),
        rows(B),
        rows(C),
        wide(D),
        gate,
        wide(dt_bias),
        dt_softplus,
        dt_min,
        dt_max,
        wide(initial_states),
    )
