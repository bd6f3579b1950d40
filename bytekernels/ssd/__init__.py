"""Mamba2's scan: state space duality."""

from bytekernels.ssd.op import mamba2_step, ssd_scan

__all__ = ["mamba2_step", "ssd_scan"]
