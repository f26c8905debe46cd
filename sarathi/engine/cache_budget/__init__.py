"""Resizes the KV cache at run time, for one server or for several that share a total. Imports nothing."""
