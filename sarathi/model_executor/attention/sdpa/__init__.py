"""Attention by torch, on any device."""
