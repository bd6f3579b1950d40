"""The causal depthwise convolution in plain PyTorch: the specification.

``y[t, c] = act(bias[c] + sum_j weight[c, K-1-j] x[t-j, c])``, where rows before a sequence's first are those of its
initial state, or zero (Gu & Dao 2023, arXiv 2312.00752, section 3.4).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bytekernels import dispatch
from bytekernels.byte_table.reference import byte_table, byte_table_backward
from bytekernels.ragged import accumulation_dtype, positions, segment_ids


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool, initial_states: Tensor | None
) -> tuple[Tensor, Tensor]:
    total, channels = x.shape
    sequences, history = cu_seqlens.numel() - 1, weight.shape[1] - 1
    wide = accumulation_dtype(x.dtype)
    if initial_states is None:
        initial_states = x.new_zeros(sequences, channels, history)

    # Each sequence with its K-1 earlier rows in front: [T + S(K-1), C]. No tap reaches out of its sequence then.
    starts = cu_seqlens[:-1].to(torch.int64) + history * torch.arange(1, sequences + 1, device=x.device)
    own = positions(cu_seqlens, total) + starts[segment_ids(cu_seqlens, total)]  # where row t of x is
    before = starts[:, None] + torch.arange(-history, 0, device=x.device)  # [S, K-1]
    rows = x.new_zeros(total + sequences * history, channels)
    rows = rows.index_copy(0, before.flatten(), initial_states.transpose(1, 2).flatten(0, 1).to(x.dtype))
    rows = rows.index_copy(0, own, x)

    y = rows.new_zeros(total, channels, dtype=wide) if bias is None else bias.to(wide).expand(total, channels)
    for back in range(history + 1):
        y = y + weight[:, history - back].to(wide) * rows[own - back].to(wide)
    ends = cu_seqlens[1:].to(torch.int64) + history * torch.arange(1, sequences + 1, device=x.device)
    last = ends[:, None] + torch.arange(-history, 0, device=x.device)  # [S, K-1]
    return (F.silu(y) if silu else y).to(x.dtype), rows[last].transpose(1, 2).contiguous()


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
    primals = (x, weight, bias, cu_seqlens, silu, initial_states)
    return dispatch.vjp(causal_conv1d, primals, (dy, dfinal_states))


def causal_conv1d_step(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    rows = torch.cat([conv_state, x.to(conv_state.dtype)[:, :, None]], 2)  # [S, C, K]
    y = (rows.to(wide) * weight.to(wide)).sum(2)
    if bias is not None:
        y = y + bias.to(wide)
    conv_state.copy_(rows[:, :, 1:])
    return (F.silu(y) if silu else y).to(x.dtype)


def byte_conv1d(*args: Any) -> Tensor:
    return convolve_bytes(causal_conv1d, *args)


def byte_conv1d_backward(*args: Any) -> list[Tensor]:
    return convolve_bytes_backward(causal_conv1d_backward, *args)


def convolve_bytes(conv: Callable[..., tuple[Tensor, Tensor]], ids: Tensor, table: Tensor, *arguments: Any) -> Tensor:
    """``conv`` (an implementation's causal_conv1d) of the table's rows by byte value, gathered first."""
    return conv(byte_table(ids, table), *arguments, None)[0]


def convolve_bytes_backward(
    conv_backward: Callable[..., list[Tensor]],
    dy: Tensor,
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    silu: bool,
) -> list[Tensor]:
    """Gradients of :func:`convolve_bytes`, by the same implementation's causal_conv1d_backward."""
    dfinal_states = dy.new_zeros(cu_seqlens.numel() - 1, weight.shape[0], weight.shape[1] - 1)
    x = byte_table(ids, table)
    dx, *rest = conv_backward(dy, dfinal_states, x, weight, bias, cu_seqlens, silu, None)
    return [byte_table_backward(dx, ids), *rest]
