"""Which rows of the KV cache each request holds."""
