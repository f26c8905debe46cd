"""Workloads: lengths, arrival times and prompts, repeatable by seed."""

from sarathi.benchmark.workload.generate import generate_requests
from sarathi.benchmark.workload.spec import RequestSpec

__all__ = ["RequestSpec", "generate_requests"]
