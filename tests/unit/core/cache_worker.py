"""A worker with a real cache on the host device and a model that only reads and writes tokens in it."""

from __future__ import annotations

import torch
from scheduler_simulation import next_token

from sarathi.config.backend import BackendSpec
from sarathi.messages import Chunk, SampledToken, SchedulerOutput, StepResult
from sarathi.worker.cache_engine.base import KVCacheSpec
from sarathi.worker.cache_engine.factory import create_cache_engine
from vattention import OutOfMemoryError


class CacheWorker:
    """Executes steps at once, as `Worker` does. Keys and values of a token are its id.

    A token is sampled from what the cache holds before it, so that a wrong key shows in the output. After each step all
    tokens of running and retained sequences are compared with those that were computed: no step may change another's.
    rows: may be lowered at any time, as if another rank had less memory.
    """

    def __init__(self, backend: BackendSpec, spec: KVCacheSpec, rows: int) -> None:
        row_bytes = spec.token_bytes * (backend.page_bytes or 0) // (spec.token_bytes // (2 * spec.num_layers))
        self.cache = create_cache_engine(backend, spec, torch.device("cpu"), rows * row_bytes)
        self.capacity = self.cache.capacity
        self.rows = self.capacity.rows
        self.sequences: dict[str, list[int]] = {}
        self.written: dict[str | int, list[int]] = {}  # what is in the cache, of each request and retained sequence
        self.in_flight: dict[int, SchedulerOutput] = {}
        self.num_failures = 0
        self.num_checked = 0

    def execute(self, out: SchedulerOutput) -> StepResult:
        self._release(out)
        for new in out.new_requests:
            self.sequences.setdefault(new.request_id, list(new.token_ids))
        self.in_flight[out.step_id] = out
        if out.num_recoveries < self.num_failures or not self._prepare(out):
            return StepResult(out.step_id, available_rows=self.rows)
        self.cache.copy_prefixes()
        for prefix in out.prefixes.shared:
            self.written[prefix.request_id] = self.written[prefix.source][: prefix.num_tokens]
        tokens = [self._compute(chunk) for chunk in out.chunks]
        self.cache.prefetch(out.chunks)
        self.check()
        return StepResult(out.step_id, tuple(token for token in tokens if token is not None))

    def complete(self, step_id: int) -> None:
        """The scheduler has the result."""
        del self.in_flight[step_id]

    def check(self) -> None:
        """Every token is where it was written."""
        self.cache.check_integrity()
        for owner, tokens in self.written.items():
            for held in self._memory(owner, 0, len(tokens)):
                assert held == tokens, f"{owner!r} has {tokens}, and its memory {held}"
                self.num_checked += 1

    def held_rows(self) -> int:
        """Distinct rows that the ledger should count, as far as they are mapped."""
        stats = self.cache._cache.stats()
        return (stats.mapped_bytes - stats.idle_bytes) // self.cache._cache.row_bytes

    def _release(self, out: SchedulerOutput) -> None:
        changes = out.prefixes
        self.cache.release((*out.preempted, *out.finished), changes)
        for request_id, key in changes.retained:
            if request_id in self.written:
                self.written[key] = self.written.pop(request_id)
        for request_id in (*out.preempted, *out.finished):
            self.written.pop(request_id, None)
        for request_id in out.finished:
            self.sequences.pop(request_id, None)
        for key, rows in changes.evicted:
            for each in [key] if key >= 0 else [other for other in self.written if isinstance(other, int)]:
                self.written[each] = self.written.get(each, [])[: self.capacity.tokens_within(rows)]
                if not rows:
                    del self.written[each]
        for request_id, key in changes.continued:
            chunk = next(chunk for chunk in out.chunks if chunk.request_id == request_id)
            self.written[request_id] = self.written.pop(key)[: chunk.start]

    def _prepare(self, out: SchedulerOutput) -> bool:
        try:
            self.cache.prepare(out.chunks, out.prefixes.shared)
        except OutOfMemoryError:
            self.num_failures += 1
            return False
        if self.held_rows() <= self.rows:
            return True
        self.cache.cancel(out.chunks)
        self.num_failures += 1
        return False

    def _compute(self, chunk: Chunk) -> SampledToken | None:
        name, end = chunk.request_id, chunk.start + chunk.num_tokens
        tokens, written = self.sequences[name], self.written.setdefault(name, [])
        assert written[: chunk.start] == tokens[: chunk.start], "what is in the cache are not the tokens before"
        self.written[name] = [*written[: chunk.start], *tokens[chunk.start : end]]
        (slot,) = self.cache.address([chunk]).slots
        ids = torch.tensor(tokens[chunk.start : end], dtype=torch.float32)[:, None, None]
        for layer in range(self.cache._cache.num_layers):
            for memory in self.cache.layer(layer):
                memory[slot, chunk.start : end] = ids
        if not chunk.samples:
            return None
        tokens.append(next_token(self._memory(name, 0, end)[0]))
        return SampledToken(name, tokens[-1])

    def _memory(self, owner: str | int, first: int, end: int) -> list[list[int]]:
        """What each layer's keys and values hold."""
        slot = self.cache._slots[owner].number
        tensors = [memory for layer in range(self.cache._cache.num_layers) for memory in self.cache.layer(layer)]
        return [memory[slot, first:end, 0, 0].int().tolist() for memory in tensors]
