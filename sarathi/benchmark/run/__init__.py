"""One run of the benchmark on one engine: requests come as the workload says, and what happened is recorded."""
