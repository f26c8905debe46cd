"""An HTTP load generator for OpenAI-compatible servers, and its results."""
