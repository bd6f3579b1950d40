"""byte_table and its backward."""

from functools import partial

import torch

from bytekernels.byte_table import triton as byte_table
from rooms.batch import EVEN, ODD, Batch, Case, empty

WIDTHS = (16, 3072, 6448)  # of embeddings, and of in_proj's output


def _byte_table(width: int, batch: Batch, strided: bool, dtype: torch.dtype) -> None:
    ids = empty(batch.bytes, dtype=torch.uint8)
    table = empty(256, 2 * width, dtype=dtype)[:, :width] if strided else empty(256, width, dtype=dtype)
    dy = byte_table.byte_table(ids, table)
    byte_table.byte_table_backward(dy, ids)


CASES: dict[str, Case] = {f"table C={width}": partial(_byte_table, width, EVEN, False) for width in WIDTHS}
CASES |= {
    "strided table C=3072": partial(_byte_table, 3072, EVEN, True),
    "table C=16 odd": partial(_byte_table, 16, ODD, False),
}
