"""FlashAttention 2, 3 and 4, and our own kernel for decode steps on slots."""
