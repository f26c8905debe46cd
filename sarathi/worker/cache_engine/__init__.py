"""KV caches behind one protocol: virtual memory or blocks."""
