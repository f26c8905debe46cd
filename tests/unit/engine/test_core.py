"""The boundary between core and front end: plain messages, no shared object, and one end of each request."""

import pickle
import random
from collections import Counter, deque
from collections.abc import Callable

import pytest
from fake_engine import END, FakeExecutor, echo, make_engine, says

from sarathi.core.scheduler import RequestTooLongError
from sarathi.engine.core import EngineCore
from sarathi.engine.llm_engine import LLMEngine
from sarathi.engine.outputs import RequestOutput
from sarathi.metrics import MetricsSink, MetricsStore
from sarathi.sampling_params import SamplingParams


class SerialisingClient:
    """A client of a core whose every argument, result and error is copied through bytes, as between processes."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self.facts = copied(core.facts)

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda *arguments: copied(getattr(self._core, name)(*copied(arguments)))


def copied(value):
    return pickle.loads(pickle.dumps(value))


class EndCounter(MetricsSink):
    """Counts what it is told of each request."""

    def __init__(self) -> None:
        self.arrivals: Counter[str] = Counter()
        self.ends: list[tuple[str, str]] = []

    def on_request_arrived(self, request_id: str, num_prompt_tokens: int, arrived_at_s: float) -> None:
        self.arrivals[request_id] += 1

    def on_request_finished(self, request_id: str, finish_reason: str) -> None:
        self.ends.append((request_id, finish_reason))


class Overlapping(FakeExecutor):
    """Two steps in flight; a step is computed when it is launched, and its result is taken later."""

    max_in_flight = 2


def overlap(engine: LLMEngine) -> LLMEngine:
    engine.core.executor = Overlapping(engine.core.executor.next_token)
    return engine


def drain(engine: LLMEngine) -> dict[str, RequestOutput]:
    last = {}
    while engine.has_work:
        last.update({output.request_id: output for output in engine.step()})
        engine.core.scheduler.check_integrity()
    return last


def shown(output: RequestOutput) -> list[tuple[object, ...]]:
    return [(each.token_ids, each.text, each.finish_reason, each.stop_reason, each.logprobs) for each in output.outputs]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        n=rng.randint(1, 3),
        seed=rng.randrange(99),
        max_tokens=rng.randint(1, 30),
        logprobs=rng.choice([None, 2]),
        stop=[chr(rng.randrange(32, 127))],
        stop_token_ids=[rng.randrange(256)],
        min_tokens=rng.choice([0, 1]),
    )


def test_every_message_can_be_serialised_and_no_object_is_shared() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")

    def answers(*, serialised: bool) -> dict[str, list[tuple[object, ...]]]:
        rng = random.Random(seed)
        engine = make_engine(echo, rows=150, chunk_size=16)
        core = engine.core
        if serialised:
            engine = LLMEngine(SerialisingClient(core), engine.tokenizer)
        seen, pending = {}, deque(range(30))
        while pending or engine.has_work:
            if pending and rng.random() < 0.5:
                prompt = rng.choices(range(256), k=rng.randint(1, 40))
                engine.add_request(str(pending.popleft()), prompt, random_params(rng))
            if rng.random() < 0.05 and len(pending) < 30:
                aborted = engine.abort(str(rng.randrange(30 - len(pending))))
                if aborted is not None:
                    seen[aborted.request_id] = shown(aborted)
            seen.update({output.request_id: shown(output) for output in engine.step()})
            core.scheduler.check_integrity()
        assert len(seen) == 30
        return seen

    assert answers(serialised=True) == answers(serialised=False)


def test_the_facts_are_those_of_the_executor() -> None:
    facts = make_engine(rows=77).core.facts
    assert (facts.vocab_size, facts.max_model_len, facts.capacity.rows, facts.token_bytes) == (257, 200, 77, 1)


@pytest.mark.parametrize(
    ("device", "mapped_weights", "dropped"), [("cpu", False, 1), ("cuda", False, 0), ("cuda:1", True, 1)]
)
def test_weights_on_a_gpu_are_dropped_from_mapped_memory_alone(device: str, mapped_weights: bool, dropped: int) -> None:
    core, calls = make_engine().core, []
    executor = core.executor
    executor.resolution = executor.resolution._replace(device=device, mapped_weights=mapped_weights)
    executor.drop_weights = lambda: calls.append(1)
    if dropped:
        core.sleep(2)
    else:
        with pytest.raises(
            ValueError, match=f"level is 2: weights on {device} cannot be released.*use 1, or .*mapped_weights=True"
        ):
            core.sleep(2)
    assert len(calls) == dropped and core.is_asleep == bool(dropped)


ENDS = {
    "end token": ("ab", {}, ("stop", None)),
    "stop token": ("ab", {"stop_token_ids": [98]}, ("stop", 98)),
    "length": ("abcdef", {"max_tokens": 3}, ("length", None)),
    "model length": ("a" * 300, {"max_tokens": None}, ("length", None)),
    "stop string": ("abcdef", {"stop": "cd"}, ("stop", "cd")),
    "stop string on the last token": ("abcdef", {"stop": "cd", "max_tokens": 4}, ("stop", "cd")),
    "stop string before a stop token": ("abcdef", {"stop": "c", "stop_token_ids": [100]}, ("stop", "c")),
    "stop string on a stop token": ("abcdef", {"stop": "cd", "stop_token_ids": [100]}, ("stop", 100)),
}


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("case", ENDS)
def test_an_end_is_told_once_and_the_same_to_caller_and_metrics(case: str, overlapping: bool) -> None:
    text, params, expected = ENDS[case]
    metrics = EndCounter()
    engine = make_engine(says(text), metrics=metrics)
    if overlapping:
        overlap(engine)
    engine.add_request("a", [0], SamplingParams(**{"max_tokens": 50, **params}))
    output = drain(engine)["a"]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == expected
    assert metrics.arrivals == {"a": 1} and metrics.ends == [("a", expected[0])]
    assert engine.num_unfinished == 0 and engine.core.executor.tokens == {}


def test_an_abort_an_error_and_a_refusal_are_told_once_too() -> None:
    metrics = EndCounter()
    engine = overlap(make_engine(says("abcdef"), metrics=metrics))
    for request_id in ("aborted", "failed"):
        engine.add_request(request_id, [0], SamplingParams(n=2, max_tokens=20))
    engine.step()
    engine.step()
    assert engine.abort("aborted") is not None and engine.abort("aborted") is None
    with pytest.raises(RequestTooLongError):
        engine.add_request("long", [1] * 300, SamplingParams())
    engine.core.executor.fail_next = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        drain(engine)
    assert drain(engine) == {}
    assert metrics.ends == [
        ("aborted", "abort"), ("aborted#1", "abort"), ("long", "error"), ("failed", "error"), ("failed#1", "error"),
    ]  # fmt: skip
    assert set(metrics.arrivals.values()) == {1}


@pytest.mark.parametrize("overlapping", [False, True])
def test_requests_that_less_memory_ends_are_told_once_too(overlapping: bool) -> None:
    metrics = EndCounter()
    engine = make_engine(echo, metrics=metrics)
    if overlapping:
        overlap(engine)
    engine.add_request("long", [1] * 60, SamplingParams(max_tokens=50))
    engine.add_request("short", [2] * 5, SamplingParams(max_tokens=5))
    for _ in range(4):
        engine.step()
    engine.core.resize(20)
    outputs = drain(engine)
    assert [each.outputs[0].finish_reason for each in outputs.values()] == ["length", "length"]
    assert outputs["long"].outputs[0].num_tokens < 5 == outputs["short"].outputs[0].num_tokens
    assert sorted(metrics.ends) == [("long", "length"), ("short", "length")]
    assert engine.num_unfinished == 0 and engine.core.executor.tokens == {}


def test_tokens_of_steps_in_flight_behind_a_stop_string_reach_nobody() -> None:
    metrics = MetricsStore()
    engine = overlap(make_engine(says("abcdefgh"), metrics=metrics))
    engine.add_request("a", [0], SamplingParams(max_tokens=50, stop="bc"))
    engine.add_request("b", [1, 0], SamplingParams(max_tokens=50))
    outputs = drain(engine)
    assert bytes(outputs["a"].outputs[0].token_ids) == b"abc" and outputs["a"].outputs[0].text == "a"
    assert outputs["b"].outputs[0].token_ids == [*b"abcdefgh", END]
    counts = {record.request_id: record.request_num_decode_tokens for record in metrics.records().requests}
    assert counts == {"0_a": 3, "0_b": 9}
