"""Mamba2's mixer between its two projections: convolution, scan, gate and norm in one op."""

from bytekernels.mixer.op import mamba2_mixer, mamba2_mixer_step
from bytekernels.mixer.state import MixerState, MixerStates

__all__ = ["MixerState", "MixerStates", "mamba2_mixer", "mamba2_mixer_step"]
