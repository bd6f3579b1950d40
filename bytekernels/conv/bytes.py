"""The causal convolution of a table's rows by byte value, as a torch.library op."""

from typing import Any

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.byte_table.op import check_ids_and_table
from bytekernels.conv.op import check_parameters, implementations
from bytekernels.ragged import check_cu_seqlens

_implementations = implementations(lambda *args: args[-5:-3])  # the table and the weight
_forward = dispatch.Dispatch("byte_conv1d", **_implementations)
_backward = dispatch.Dispatch("byte_conv1d_backward", **_implementations)


@torch.library.custom_op("bytekernels::byte_conv1d", mutates_args=())
def byte_conv1d_op(
    ids: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> Tensor:
    return _forward(ids, table, weight, bias, cu_seqlens, silu)


@byte_conv1d_op.register_fake
def _(ids: Tensor, table: Tensor, *_: Any) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


@torch.library.custom_op("bytekernels::byte_conv1d_backward", mutates_args=())
def byte_conv1d_backward_op(
    dy: Tensor, ids: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool
) -> list[Tensor]:
    return _backward(dy, ids, table, weight, bias, cu_seqlens, silu)


@byte_conv1d_backward_op.register_fake
def _(dy: Tensor, *inputs: Any) -> list[Tensor]:
    return dispatch.fake_gradients(inputs)


dispatch.register_gradients(byte_conv1d_op, byte_conv1d_backward_op)


def byte_conv1d(
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    activation: str | None = "silu",
) -> Tensor:
    """``causal_conv1d(byte_table(ids, table), weight, bias, cu_seqlens)``: block 0's convolution.

    ``y[t, c] = act(bias[c] + sum_j weight[c, K-1-j] table[ids[t-j], c])`` with j from 0 to K-1 and zero for rows before
    a sequence's first (Gu & Dao 2023, arXiv 2312.00752, section 3.4). On a GPU the gathered [T, C] is never in memory.

    Args:
        ids: uint8 [T].
        table: [256, C], a floating dtype. Rows may be strided, as in a slice of columns.
        weight: [C, K].
        bias: [C] or None.
        cu_seqlens: int32 [S+1], the offsets of the sequences.
        activation: "silu" or None.

    Returns:
        [T, C] in the table's dtype.

    Raises:
        TypeError: ids that are not uint8, a table that is not floating, or cu_seqlens not int32.
        ValueError: shapes that do not match, offsets out of order, or another activation.
    """
    check_ids_and_table(ids, table)
    check_parameters(table.shape[1], weight, bias, activation)
    check_cu_seqlens(cu_seqlens, ids.shape[0])
    return byte_conv1d_op(ids, table, weight, bias, cu_seqlens, activation == "silu")
