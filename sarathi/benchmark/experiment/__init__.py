"""Experiments: a grid of runs from a YAML file, one process for each engine that they need, and tables over results."""
