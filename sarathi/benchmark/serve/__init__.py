"""HTTP load generator for OpenAI-compatible servers."""
