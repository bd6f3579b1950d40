"""One draw from each row of logits, each row with its own settings, and the numbers that decide the draws."""

from bytekernels.sample.op import sample, uniform

__all__ = ["sample", "uniform"]
