"""Metrics of a running engine: recording (store, records) and reporting (report)."""

from sarathi.metrics.records import RunRecords, StepTimes, merge
from sarathi.metrics.store import MetricsSink, MetricsStore

__all__ = ["MetricsSink", "MetricsStore", "RunRecords", "StepTimes", "merge"]
