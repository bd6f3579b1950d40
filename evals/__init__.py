"""Evaluation of byte-level models: bits per byte, tasks, robustness."""
