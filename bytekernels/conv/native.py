"""The causal convolution through the extension: csrc/conv.h. Float32 and bfloat16 on the CPU."""

from typing import Any

import torch
from torch import Tensor

from bytekernels import _C
from bytekernels.conv.reference import convolve_bytes, convolve_bytes_backward
from bytekernels.extension import array, fresh, rows, threads


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool, initial_states: Tensor | None
) -> tuple[Tensor, Tensor]:
    channels, width = weight.shape
    y = fresh(x)
    final_states = x.new_empty(len(cu_seqlens) - 1, channels, width - 1)
    _C.causal_conv1d(
        x.dtype == torch.bfloat16,
        (*x.shape, width),
        array(cu_seqlens.contiguous()),
        _arguments(x, weight, bias, silu, initial_states),
        array(y),
        array(final_states),
        threads(),
    )
    return y, final_states


def causal_conv1d_backward(
    dy: Tensor,
    dfinal_states: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    silu: bool,
    initial_states: Tensor | None,
) -> list[Tensor]:
    dx = fresh(x)
    parameters = [weight, bias, initial_states]  # whose gradients come in float32
    outputs = [None if value is None else value.new_empty(value.shape, dtype=torch.float32) for value in parameters]
    _C.causal_conv1d_backward(
        x.dtype == torch.bfloat16,
        (*x.shape, weight.shape[1]),
        array(cu_seqlens.contiguous()),
        _arguments(x, weight, bias, silu, initial_states),
        array(dy.to(x.dtype).contiguous()),
        array(dfinal_states.to(x.dtype).contiguous()),
        (array(dx), *(None if output is None else array(output) for output in outputs)),
        threads(),
    )
    pairs = zip(outputs, parameters, strict=True)
    return [dx, *(out.to(value.dtype) for out, value in pairs if out is not None and value is not None)]


def byte_conv1d(*args: Any) -> Tensor:
    return convolve_bytes(causal_conv1d, *args)


def byte_conv1d_backward(*args: Any) -> list[Tensor]:
    return convolve_bytes_backward(causal_conv1d_backward, *args)


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_states: Tensor | None
) -> tuple[object, ...]:
    return (
        rows(x),
        array(weight.float().contiguous()),
        None if bias is None else array(bias.float().contiguous()),
        silu,
        None if initial_states is None else array(initial_states.to(x.dtype).contiguous()),
    )
