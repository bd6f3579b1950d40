"""Chunk ends held to a vocabulary: the likeliest of those whose chunks are its strings."""

from bytekernels.constrain.op import constrain_ends

__all__ = ["constrain_ends"]
