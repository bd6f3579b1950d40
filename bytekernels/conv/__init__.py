"""The short causal convolution in front of Mamba2's scan."""

from bytekernels.conv.bytes import byte_conv1d
from bytekernels.conv.op import causal_conv1d, causal_conv1d_step

__all__ = ["byte_conv1d", "causal_conv1d", "causal_conv1d_step"]
