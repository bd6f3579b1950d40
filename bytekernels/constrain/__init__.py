"""Chunk ends held to a vocabulary: chunks are its strings wherever the bytes allow."""

from bytekernels.constrain.op import constrain_ends

__all__ = ["constrain_ends"]
