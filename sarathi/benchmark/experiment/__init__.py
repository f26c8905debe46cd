"""Experiments: a grid of runs from a YAML file, one process per engine configuration, and tables of the results."""
