"""Benchmarks of the engine and of servers: workloads, runner, capacity search, load generator."""
