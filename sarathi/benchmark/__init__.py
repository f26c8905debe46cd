"""Experiments on the engine and on servers: workloads, runner, capacity search, load generator. Above the engine."""
