"""Documents and padded rows to packed batches and back, next-byte targets, and token ends."""

from bytekernels.pack.op import next_byte_targets, pack_bytes, pack_padded, token_end_mask, unpack

__all__ = ["next_byte_targets", "pack_bytes", "pack_padded", "token_end_mask", "unpack"]
