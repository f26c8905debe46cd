"""The parts of the HTTP server that all APIs share: application, errors, event streams, health and metrics."""
