"""Merge the responses of all replicas to a request about the server itself."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from fastapi import Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from sarathi.entrypoints.replicas.messages import Head, WholeAnswer
from sarathi.entrypoints.server.errors import APIError

Merge = Callable[[Sequence[WholeAnswer], bool], WholeAnswer]
_OK = 200


def merge_health(answers: Sequence[WholeAnswer], is_draining: bool) -> WholeAnswer:
    """200 while at least one replica is healthy."""
    return _first(answers, lambda status: status == _OK) or _unavailable()


def merge_ready(answers: Sequence[WholeAnswer], is_draining: bool) -> WholeAnswer:
    """200 while at least one replica accepts requests and the server is not draining."""
    if is_draining:
        error = APIError(503, "the server is draining", "service_unavailable_error", code="draining")
        return _whole(error.response())
    return merge_health(answers, is_draining)


def merge_changes(answers: Sequence[WholeAnswer], is_draining: bool) -> WholeAnswer:
    """The first error, if any; the change applies to the other replicas nevertheless."""
    return _first(answers, lambda status: status != _OK) or _first(answers, lambda status: True) or _unavailable()


def merge_numbers(answers: Sequence[WholeAnswer], is_draining: bool) -> WholeAnswer:
    """Sums of the numbers in the JSON objects; other values are those of the first replica."""
    if error := _first(answers, lambda status: status != _OK):
        return error
    if not answers:
        return _unavailable()
    objects: list[dict[str, Any]] = [msgspec.json.decode(each.body) for each in answers]
    total = {
        name: sum(each[name] for each in objects) if isinstance(value, (int, float)) else value
        for name, value in objects[0].items()
    }
    return _whole(Response(msgspec.json.encode(total), media_type="application/json"))


def merge_metrics(answers: Sequence[WholeAnswer], is_draining: bool) -> WholeAnswer:
    """The metrics of all replicas, labelled by `replica`."""
    if error := _first(answers, lambda status: status != _OK):
        return error
    registry = CollectorRegistry()
    registry.register(_Relabelled(answers))
    return _whole(Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST}))


class _Relabelled(Collector):
    """Metrics parsed from the replicas' text."""

    def __init__(self, answers: Sequence[WholeAnswer]) -> None:
        self._answers = answers

    def collect(self) -> Iterable[Metric]:
        merged: dict[str, Metric] = {}
        for answer in self._answers:
            for family in text_string_to_metric_families(answer.body.decode()):
                into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for each in family.samples:
                    into.add_sample(each.name, {**each.labels, "replica": answer.replica}, each.value)
        return merged.values()


def _first(answers: Sequence[WholeAnswer], wanted: Callable[[int], bool]) -> WholeAnswer | None:
    return next((each for each in answers if wanted(each.head.status)), None)


def _unavailable() -> WholeAnswer:
    error = APIError(503, "no replica is running", "service_unavailable_error", code="unavailable")
    return _whole(error.response())


def _whole(response: Response) -> WholeAnswer:
    return WholeAnswer("", Head(response.status_code, tuple(response.raw_headers)), bytes(response.body))


MERGES: dict[str, Merge] = {
    "/health": merge_health, "/ping": merge_health, "/ready": merge_ready, "/metrics": merge_metrics,
    "/load": merge_numbers, "/stats": merge_numbers, "/kv/budget": merge_changes, "/sleep": merge_changes,
    "/wake_up": merge_changes,
}  # fmt: skip
