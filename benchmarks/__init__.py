"""Speed and memory of the kernels, beside what else can do the same: ``python benchmarks/bench_chunking.py``."""
