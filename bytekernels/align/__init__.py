"""Batches of training data: windows of a corpus's bytes with the ends of its tokens, packed in one call."""

from bytekernels.align.batch import AlignedBatch
from bytekernels.align.op import align_pack

__all__ = ["AlignedBatch", "align_pack"]
