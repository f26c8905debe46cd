"""Two cores over executors without a model: steps in flight, shortages, aborts, sleep and budgets on either side."""

import random
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest
from fake_engine import FakeExecutor

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.prefix_caching.manager import PrefixCachingBlockSpaceManager
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.core.scheduler import RequestTooLongError, Scheduler, make_scheduler
from sarathi.engine.prefill_decode.core import PrefillDecodeCore
from sarathi.engine.prefill_decode.prefill import PrefillCore, PrefillThread
from sarathi.executor.ranks.group import RankError
from sarathi.messages import (
    Arrival,
    CacheCapacity,
    CompletedStep,
    NewRequest,
    Portion,
    SampledToken,
    SchedulerOutput,
    StepResult,
)
from sarathi.sampling_params import SamplingParams
from sarathi.transfer.portions import Portions

ROWS, MOST_RECEIVED, CHUNK = 60, 100, 16
MAX_MODEL_LEN = 100


def next_token(tokens: Sequence[int], params: SamplingParams) -> int:
    return (sum(tokens) * 31 + len(tokens)) % 251


class Side(FakeExecutor):
    """Two steps in flight, as on a GPU. Fails a step where `shortages` says so, and what was launched before that is
    known.

    sent: portions of each prompt, of the side that computes prompts. mapped: requests with memory. firsts: where what
    is received of a prompt begins.
    """

    max_in_flight, takes_functions = 2, False

    def __init__(self, shortages: Iterator[bool]) -> None:
        super().__init__(next_token, CacheCapacity(ROWS, 1, 1))
        self.shortages, self.num_shortages = shortages, 0
        self.sent: defaultdict[str, list[Portion]] = defaultdict(list)
        self.mapped: set[str] = set()
        self.firsts: dict[str, int] = {}
        self.partner: Side | None = None
        self.kill_reason: str | None = None

    def launch(self, out: SchedulerOutput) -> CompletedStep:
        self.mapped -= {*out.preempted, *out.finished}
        is_old = self.num_shortages > out.num_recoveries
        if is_old or ((out.chunks or out.received) and next(self.shortages)):
            self.num_shortages += not is_old
            self.execute(SchedulerOutput(out.step_id, out.new_requests, finished=out.finished))
            return CompletedStep(StepResult(out.step_id, available_rows=ROWS - 1))
        self.mapped |= {chunk.request_id for chunk in (*out.chunks, *out.received)}
        self.firsts |= {chunk.request_id: chunk.start for chunk in out.received}
        self._send(out)
        result = self.execute(out)
        for chunk in out.chunks:
            assert not chunk.samples or chunk.start + chunk.num_tokens == len(self.tokens[chunk.request_id]) - 1
        return CompletedStep(result)

    def _send(self, out: SchedulerOutput) -> None:
        ends = {chunk.request_id: chunk.start + chunk.num_tokens for chunk in out.chunks}
        for portion in out.sent:
            before = self.sent[portion.request_id]
            assert self.partner is not None and portion.request_id in self.partner.mapped
            first = before[-1].end if before else self.partner.firsts[portion.request_id]
            assert portion.first == first < portion.end <= ends[portion.request_id]
            before.append(portion)

    def ask(self, method: str, arrivals: Sequence[Arrival]) -> None:
        """What the decoding side is told about prompts."""
        assert method == "arrive" and self.partner is not None
        for request_id, num_portions, token in arrivals:
            sent = self.partner.sent[request_id]
            assert len(sent) == num_portions and request_id in self.mapped
            if token is not None:
                assert sent[-1].end == len(self.tokens[request_id])
                self.tokens[request_id].append(token.token_id)

    def kill(self, reason: str) -> None:
        self.kill_reason = reason


def scheduler_of(num_retained: int, chunk_size: int, most_received: int = 0) -> Scheduler:
    kind = PrefixCachingBlockSpaceManager if num_retained else VirtualBlockSpaceManager
    manager = kind(CacheCapacity(ROWS, 1, 1, num_retained=num_retained))
    config = SchedulerConfig(chunk_size=chunk_size, max_num_seqs=8)
    return make_scheduler(config, manager, MAX_MODEL_LEN, 1, most_received)


def make_core(prefill_short: Iterator[bool], decode_short: Iterator[bool], num_retained: int = 0) -> PrefillDecodeCore:
    prefill, decode = Side(prefill_short), Side(decode_short)
    prefill.partner, decode.partner = decode, prefill
    portions = Portions("fa_vattn_megacache", 2, max_ranges=64)
    prefill_thread = PrefillThread(PrefillCore(scheduler_of(num_retained, CHUNK), prefill, portions))  # type: ignore[arg-type]
    return PrefillDecodeCore(scheduler_of(num_retained, 8, MOST_RECEIVED), decode, prefill_thread)  # type: ignore[arg-type]


def never() -> Iterator[bool]:
    while True:
        yield False


def often(rng: random.Random, probability: float) -> Iterator[bool]:
    while True:
        yield rng.random() < probability


def request(name: str, length: int, max_tokens: int, seed: int = 1) -> NewRequest:
    """Prompts of one seed begin alike."""
    tokens = tuple(random.Random(seed).choices(range(1, 250), k=length))
    return NewRequest(name, tokens, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))


def expected(new: NewRequest) -> list[int]:
    tokens = list(new.token_ids)
    for _ in range(new.sampling_params.max_tokens or 0):
        tokens.append(next_token(tokens, new.sampling_params))
    return tokens[len(new.token_ids) :]


class Outputs:
    """The tokens and ends of requests, step by step."""

    def __init__(self, core: PrefillDecodeCore) -> None:
        self.core = core
        self.tokens: defaultdict[str, list[int]] = defaultdict(list)
        self.ends: dict[str, str] = {}

    def step(self) -> None:
        for update in self.core.step().updates:
            self.tokens[update.request_id] += [token.token_id for token in update.tokens]
            if update.finish_reason is not None:
                self.ends[update.request_id] = update.finish_reason

    def run(self) -> None:
        while self.core.has_work:
            self.step()


def check_idle(core: PrefillDecodeCore) -> None:
    def check(side: PrefillDecodeCore | PrefillCore) -> int:
        side.scheduler.check_integrity()
        return side.scheduler.block_space_manager.num_used_rows

    assert check(core) == core._prefill_thread.call(check) == 0
    assert core.stats().used_rows == 0


@pytest.mark.parametrize(
    ("decode_shortage", "num_retained", "seed"),
    [(0.0, 0, None), (0.0, 5, None), (0.05, 0, None), (0.05, 5, None), (0.05, 5, 270270191)],  # the last one had no hit
)
def test_random_requests_with_shortages_and_aborts_get_their_tokens(
    decode_shortage: float, num_retained: int, seed: int | None
) -> None:
    """Where memory runs short for one that decodes, it ends early, as with one engine."""
    seed = random.randrange(2**31) if seed is None else seed
    print(f"seed {seed}")
    rng = random.Random(seed)
    core = make_core(often(random.Random(seed + 1), 0.2), often(random.Random(seed + 2), decode_shortage), num_retained)
    outputs, new = Outputs(core), [request(f"r{i}", rng.randint(1, 50), rng.randint(1, 10), i % 3) for i in range(40)]
    aborted: set[str] = set()
    for each in new:
        core.add_requests([each])
        for _ in range(rng.randrange(4)):
            outputs.step()
        if rng.random() < 0.2:
            name = rng.choice(new[: int(each.request_id[1:]) + 1]).request_id
            if name not in outputs.ends:
                core.finish(name, "abort")
                aborted.add(name)
        if rng.random() < 0.1:
            core.sleep()
            core.wake_up()
    outputs.run()
    for each in new:
        if each.request_id not in aborted:
            end, tokens = outputs.ends[each.request_id], outputs.tokens[each.request_id]
            assert (end, tokens) == ("length", expected(each)) or decode_shortage
            assert tokens == expected(each)[: len(tokens)]
    for side in (core.executor, core._prefill_thread.executor):
        side.shortages = never()  # type: ignore[attr-defined]
    for name in "xy":  # the second one begins as the first
        core.add_requests([request(name, 40, 2)])
        outputs.run()
    assert bool(core.prefix_cache_stats().num_hit_tokens) == bool(num_retained)
    check_idle(core)
    core.shutdown()


@pytest.mark.parametrize("length", [1, 30, 50])
def test_a_prompt_alone_for_which_memory_runs_short_is_computed_where_it_decodes(length: int) -> None:
    always = iter(lambda: True, False)
    core, new = make_core(always, never()), request("a", length, 4)
    outputs = Outputs(core)
    core.add_requests([new])
    outputs.run()
    assert outputs.tokens["a"] == expected(new)
    check_idle(core)
    core.shutdown()


def test_a_prompt_that_never_fits_is_refused_with_the_numbers() -> None:
    core = make_core(never(), never())
    with pytest.raises(RequestTooLongError, match="has 61 tokens: the whole cache holds 60"):
        core.add_requests([request("a", 61, 4)])
    core.shutdown()


def test_a_budget_is_for_both_engines_and_prompts_that_do_not_fit_are_refused() -> None:
    core, new = make_core(never(), never()), request("a", 20, 4)
    outputs = Outputs(core)
    core.set_cache_budget(61)  # bytes; a row has one, 30 rows each
    assert (core.executor.cache_rows, core._prefill_thread.executor.cache_rows) == (30, 30)  # type: ignore[attr-defined]
    assert core.stats().total_rows == 60
    with pytest.raises(RequestTooLongError, match="has 31 tokens: the whole cache holds 30"):
        core.add_requests([request("b", 31, 4)])
    core.add_requests([new])
    outputs.run()
    assert outputs.tokens["a"] == expected(new)
    with pytest.raises(ValueError, match="memory_bytes is 1: it must be at least 2, one row of pages in each engine"):
        core.set_cache_budget(1)
    core.shutdown()


def test_a_budget_that_shrinks_under_requests_changes_no_token() -> None:
    core = make_core(never(), never())
    outputs, new = Outputs(core), [request(f"r{i}", 10 + i, 9, i) for i in range(12)]
    core.add_requests(new)
    for rows in (25, 60, 30):
        for _ in range(3):
            outputs.step()
        core.set_cache_budget(2 * rows)
    outputs.run()
    assert [outputs.tokens[each.request_id] for each in new] == [expected(each) for each in new]
    assert core.executor.cache_rows == 30  # type: ignore[attr-defined]
    check_idle(core)
    core.shutdown()


def test_what_is_wrong_in_the_other_engine_ends_both() -> None:
    core = make_core(never(), never())
    core._prefill_thread.executor.fail_next = AssertionError("a defect")  # type: ignore[attr-defined]
    core.add_requests([request("a", 5, 4)])
    message = "the prefill engine has ended: AssertionError: a defect"
    for _ in range(2):
        with pytest.raises(RankError, match=message):
            for _ in range(100):
                core.step()
        core.reset()
    assert message in str(core.executor.kill_reason)  # type: ignore[attr-defined]
    core.shutdown()


def test_the_prefix_cache_is_reset_only_without_a_request() -> None:
    core = make_core(never(), never())
    outputs = Outputs(core)
    core.add_requests([request("a", 5, 9)])
    while not outputs.tokens["a"]:
        outputs.step()
    assert not core.reset_prefix_cache()
    outputs.run()
    assert core.reset_prefix_cache()
    core.shutdown()


def test_numbers_of_a_busy_engine_do_not_wait_for_its_step() -> None:
    core, hold = make_core(never(), never()), threading.Event()
    side = core._prefill_thread.executor
    launch = side.launch
    side.launch = lambda out: (hold.wait(60), launch(out))[1]  # type: ignore[assignment, method-assign]
    core.add_requests([request("a", 5, 2)])
    outputs = Outputs(core)
    outputs.step()
    assert core.stats().num_running == 1 and core.memory_stats().mapped_bytes >= 0
    hold.set()
    outputs.run()
    core.shutdown()
    assert SampledToken("a", outputs.tokens["a"][0]).token_id == expected(request("a", 5, 2))[0]
