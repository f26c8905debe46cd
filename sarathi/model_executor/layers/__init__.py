"""The parts of a decoder: weights and the few operations on them; knows no requests, no cache and no files."""
