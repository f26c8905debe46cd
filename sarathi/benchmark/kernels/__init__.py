"""Parts of scripts/benchmark_kernels.py. Knows kernels and shapes, nothing of engines."""
