"""Attention over the KV cache: one interface (base), a folder for each kernel library."""
