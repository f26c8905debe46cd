"""Measurement of a running engine: rows (store, records), and what is made of them (report). Knows no torch."""

from sarathi.metrics.records import RunRows, StepTimes, merge
from sarathi.metrics.store import MetricsSink, MetricsStore, NullMetricsStore

__all__ = ["MetricsSink", "MetricsStore", "NullMetricsStore", "RunRows", "StepTimes", "merge"]
