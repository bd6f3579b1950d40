"""What the room's implementations share."""

import torch
from torch import Tensor


def row_bytes(tensor: Tensor, leading: int) -> int:
    """Bytes of one row: what the dimensions after the ``leading`` ones hold."""
    return int(torch.Size(tensor.shape[leading:]).numel()) * tensor.element_size()


def check_rows(out: Tensor, total: int) -> None:
    """Refuse an output of bytes that is not contiguous [total]."""
    if out.shape != (total,) or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous of shape [{total}], the bytes of the batch, got {list(out.shape)} with strides "
            f"{out.stride()}"
        )
