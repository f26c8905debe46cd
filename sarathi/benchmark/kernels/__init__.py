"""Microbenchmarks of kernels: attention, matrix products, element-wise operations, and a roofline of the engine."""
