"""Attention over a KV cache: one protocol, several kernels; knows tensors and addresses, not who granted the memory."""
