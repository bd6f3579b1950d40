"""Documents and padded rows to packed batches and back, next-byte targets, token ends, and where rows lie."""

from bytekernels.pack.bytes import pack_bytes
from bytekernels.pack.op import next_byte_targets, pack_padded, row_index, token_end_mask, unpack

__all__ = ["next_byte_targets", "pack_bytes", "pack_padded", "row_index", "token_end_mask", "unpack"]
