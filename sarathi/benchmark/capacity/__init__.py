"""The highest request rate that meets a latency target: the search itself, and runs as its probes."""
