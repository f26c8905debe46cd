"""Workloads: lengths, arrival times and prompts, repeatable by seed. Knows no engine and no server."""

from sarathi.benchmark.request_generator.generate import generate_requests
from sarathi.benchmark.request_generator.spec import RequestSpec

__all__ = ["RequestSpec", "generate_requests"]
