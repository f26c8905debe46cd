"""One rank of an engine: cache, model, and the tokens of running requests."""
