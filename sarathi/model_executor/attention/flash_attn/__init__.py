"""FlashAttention 2, 3 and 4, and our split-KV decode kernel."""
