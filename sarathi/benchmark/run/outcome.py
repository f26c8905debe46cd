"""The outcome of one replica's run. No torch: results are read and written without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sarathi.benchmark.workload.sharing import PrefixReuse
from sarathi.benchmark.workload.spec import RequestSpec
from sarathi.metrics import RunRecords

COMPLETED, TIME_LIMIT, INTERRUPTED, DIED = "completed", "time limit", "interrupted", "a replica died"
Planned = tuple[tuple[int, RequestSpec], ...]
"""Requests with their numbers."""


@dataclass(frozen=True)
class RunOutcome:
    """ended: COMPLETED, TIME_LIMIT, INTERRUPTED or DIED. records: None if metrics were off.

    refused: request id -> why the engine would not take it. responses: where they were asked for. requests: number and
    lengths of each that was planned, answered or not. engine: what "auto" became, and the tokens that the cache holds.
    reuse: what prompts of this replica have in common, and what of it was in the cache.
    """

    ended: str
    duration_s: float
    num_finished: int
    refused: dict[str, str]
    responses: list[dict[str, Any]]
    records: RunRecords | None
    requests: Planned = ()
    engine: Mapping[str, object] = field(default_factory=dict)
    reuse: PrefixReuse = PrefixReuse()  # noqa: RUF009 (immutable)
