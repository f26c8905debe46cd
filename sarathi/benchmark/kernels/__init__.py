"""Kernels alone: attention, matrix products, element-wise operations, and the bound that they set for an engine."""
