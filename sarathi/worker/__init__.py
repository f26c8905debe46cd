"""Executes steps: owns the cache, the model and each request's tokens; knows no queues and no text."""
