"""Decode attention over a contiguous strided cache."""
