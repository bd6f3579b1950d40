"""Rows of a table by byte value in plain PyTorch: the specification."""

import torch
from torch import Tensor

from bytekernels.ragged import accumulation_dtype


def byte_table(ids: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, ids.to(torch.int32))


def byte_table_backward(dy: Tensor, ids: Tensor) -> Tensor:
    """Sum of dy's rows by byte value: [256, C]."""
    wide = dy.to(accumulation_dtype(dy.dtype))
    return torch.ops.aten.embedding_dense_backward(wide, ids.to(torch.int64), 256, -1, False).to(dy.dtype)
