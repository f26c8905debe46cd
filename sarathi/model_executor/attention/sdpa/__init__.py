"""Attention by torch, on every device."""
