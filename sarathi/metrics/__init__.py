"""Measurements of a running engine: how they are recorded (store, records) and reported (report)."""

from sarathi.metrics.records import RunRecords, StepTimes, merge
from sarathi.metrics.store import MetricsSink, MetricsStore

__all__ = ["MetricsSink", "MetricsStore", "RunRecords", "StepTimes", "merge"]
