"""The HTTP server apart from any API: the application, errors, event streams, health and metrics."""
