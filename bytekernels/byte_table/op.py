"""byte_table as a torch.library op."""

from typing import Any

import torch
from torch import Tensor

from bytekernels import dispatch
from bytekernels.ragged import check_bytes

_implementations = dict(triton=dispatch.triton("byte_table"), reference=dispatch.reference("byte_table"))
_byte_table = dispatch.Dispatch("byte_table", **_implementations)
_byte_table_backward = dispatch.Dispatch("byte_table_backward", **_implementations)


@torch.library.custom_op("bytekernels::byte_table", mutates_args=())
def byte_table_op(ids: Tensor, table: Tensor) -> Tensor:
    return _byte_table(ids, table)


@byte_table_op.register_fake
def _(ids: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


@torch.library.custom_op("bytekernels::byte_table_backward", mutates_args=())
def byte_table_backward_op(dy: Tensor, ids: Tensor) -> Tensor:
    return _byte_table_backward(dy, ids)


@byte_table_backward_op.register_fake
def _(dy: Tensor, ids: Tensor) -> Tensor:
    return dy.new_empty(256, dy.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
    (ids,) = ctx.saved_tensors
    return None, byte_table_backward_op(dy.contiguous(), ids)


byte_table_op.register_autograd(_backward, setup_context=_setup_context)


def byte_table(ids: Tensor, table: Tensor) -> Tensor:
    """The table's row for each byte.

    Before the first block nothing but the byte is known, so ``in_proj(norm(E[x]))`` is
    ``byte_table(x, in_proj(norm(E)))``: a GEMM over 256 rows in place of one over T. The gradient is a sum of rows by
    byte value, carried in float32 (float64 for a float64 table).

    Args:
        ids: uint8 [T].
        table: [256, C], a floating dtype. Rows may be strided, as in a slice of columns.

    Returns:
        [T, C] in the table's dtype.

    Raises:
        TypeError: ids that are not uint8, or a table that is not floating.
        ValueError: shapes that do not match.
    """
    check_ids_and_table(ids, table)
    return byte_table_op(ids, table)


def check_ids_and_table(ids: Tensor, table: Tensor) -> None:
    check_bytes(ids)
    if ids.dim() != 1:
        raise ValueError(f"ids must have shape [T], got {list(ids.shape)}")
    if not table.is_floating_point():
        raise TypeError(f"table must have a floating dtype, got {table.dtype}")
    if table.dim() != 2 or table.shape[0] != 256:
        raise ValueError(f"table must have shape [256, C], a row for each byte value, got {list(table.shape)}")
