"""From chunks back to bytes."""

from bytekernels.dechunk.op import dechunk

__all__ = ["dechunk"]
