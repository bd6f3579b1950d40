"""Root-mean-square norms: with a residual, and after Mamba2's gate."""

from bytekernels.norm.op import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]
