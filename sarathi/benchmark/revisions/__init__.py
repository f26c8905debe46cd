"""Comparison of two checkouts of the engine: worker.py runs in each, compare.py drives both."""
