"""Experiments: a grid of runs from a YAML file, each in a process of its own, and tables over their results."""
