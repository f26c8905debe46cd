"""Tensor parallelism: what each rank holds of a model, and what the ranks exchange in a step."""
