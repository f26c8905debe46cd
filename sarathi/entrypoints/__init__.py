"""User interfaces: the class `LLM`, the command line and the HTTP server."""
