"""Tensor and pipeline parallelism: each rank's share of a model, and what ranks exchange in a step."""
