"""KL divergence of two linear heads' distributions without their logits in memory."""

from bytekernels.linear_kl.op import linear_kl

__all__ = ["linear_kl"]
