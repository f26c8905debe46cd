"""Random histories against a model that is a sum: whatever fits the budget can be prepared, and stays as written."""

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vattention import NoFreeSlotError, OutOfMemoryError, VirtualKVCache

PAGE = 4096


class History(RuleBasedStateMachine):
    @initialize(
        megacache=st.booleans(), head_size=st.integers(1, 600), rows=st.integers(1, 120), deferred=st.booleans(),
        threshold=st.sampled_from([0.0, 0.1, 0.5]),
    )  # fmt: skip
    def start(self, megacache: bool, head_size: int, rows: int, deferred: bool, threshold: float) -> None:
        self.rows = rows
        self.cache = VirtualKVCache(
            num_layers=2, num_kv_heads=1, head_size=head_size, num_slots=4, max_tokens=200, dtype=torch.int16,
            budget_bytes=rows * (2 if megacache else 4) * PAGE, page_bytes=PAGE, megacache=megacache,
            deferred_reclamation=deferred, reclaim_threshold=threshold,
        )  # fmt: skip
        self.lengths: dict[int, int] = {}
        self.contents: dict[int, list[int]] = {}  # what each token of a slot holds
        self.clock = 0

    def write(self, slot: int, begin: int, end: int) -> None:
        self.clock = self.clock % 30000 + 1
        for layer in range(2):
            for side, tensor in enumerate(self.cache.layer(layer)):
                tensor[slot, begin:end] = self.clock * (-1) ** side + layer
        self.contents[slot][begin:end] = [self.clock] * (end - begin)

    @rule(tokens=st.integers(0, 200))
    def alloc(self, tokens: int) -> None:
        if len(self.lengths) == 4:
            try:
                self.cache.alloc(tokens)
            except NoFreeSlotError:
                return
            raise AssertionError("a fifth slot of four")
        slot = self.cache.alloc(tokens)
        assert slot not in self.lengths
        self.lengths[slot], self.contents[slot] = 0, []

    @precondition(lambda self: self.lengths)
    @rule(growth=st.lists(st.integers(0, 90), min_size=4, max_size=4))
    def prepare(self, growth: list[int]) -> None:
        goal = {slot: min(200, length + more) for (slot, length), more in zip(self.lengths.items(), growth)}  # noqa: B905
        needed = sum(self.cache.rows_for(length) for length in goal.values())
        try:
            self.cache.prepare(list(goal), list(goal.values()))
        except OutOfMemoryError as error:
            assert needed > self.rows and error.needed > error.available == self.rows
            return
        for slot, length in goal.items():
            begin, self.lengths[slot] = self.lengths[slot], length
            self.write(slot, begin, length)

    @precondition(lambda self: self.lengths)
    @rule(ahead=st.integers(1, 60))
    def prefetch(self, ahead: int) -> None:
        self.cache.prefetch(list(self.lengths), [length + ahead for length in self.lengths.values()], lead_tokens=ahead)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.lengths)))
        self.cache.free(slot)
        del self.lengths[slot], self.contents[slot]

    @precondition(lambda self: len(self.lengths) >= 2 and 0 in self.lengths.values())
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        target = next(slot for slot, length in self.lengths.items() if length == 0)
        source = data.draw(st.sampled_from(sorted(slot for slot in self.lengths if slot != target)))
        tokens = data.draw(st.integers(0, self.lengths[source]))
        period = PAGE // math.gcd(PAGE, self.cache.token_bytes)
        shared = self.cache.share(source, target, tokens)
        assert shared == tokens - tokens % period
        self.lengths[target], self.contents[target] = shared, self.contents[source][:shared]

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.lengths)))
        tokens = data.draw(st.integers(0, self.lengths[slot]))
        try:
            assert self.cache.trim(slot, tokens) == tokens
        except ValueError as error:
            assert "shares its first" in str(error)
            return
        self.lengths[slot] = tokens
        del self.contents[slot][tokens:]

    @rule(rows=st.integers(1, 120))
    def resize(self, rows: int) -> None:
        try:
            self.cache.resize(rows * self.cache.row_bytes)
        except OutOfMemoryError:
            assert rows < self.rows
            return
        self.rows = rows

    @rule(tokens=st.integers(0, 200))
    def map_ahead(self, tokens: int) -> None:
        self.cache.map_ahead(tokens)

    @rule(rows=st.integers(0, 130))
    def fill_pool(self, rows: int) -> None:
        self.cache.fill_pool(rows * self.cache.row_bytes)

    @invariant()
    def accounting_is_consistent(self) -> None:
        self.cache.check_integrity()
        stats = self.cache.stats()
        assert stats.created_bytes <= stats.capacity_bytes == self.rows * self.cache.row_bytes
        assert stats.worker_failures == 0, stats.worker_error

    @invariant()
    def every_token_is_as_written(self) -> None:
        for slot, contents in self.contents.items():
            expected = torch.tensor(contents, dtype=torch.int16)
            for layer in range(2):
                for side, tensor in enumerate(self.cache.layer(layer)):
                    got = tensor[slot, : len(contents)]
                    assert torch.equal(got[:, 0, 0], expected * (-1) ** side + layer)
                    assert torch.equal(got[:, 0, -1], got[:, 0, 0])

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            assert self.cache.stats().created_bytes == 0


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
