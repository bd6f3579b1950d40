"""Chunk ends held to a vocabulary: chunks are its strings as far as one byte of lookahead can tell."""

from bytekernels.constrain.op import constrain_ends

__all__ = ["constrain_ends"]
