"""The size of the KV cache while it is used: of one server, or of several that share a total. Imports nothing."""
