"""The engine over a model of a few lines: what comes out, when, and that no request can end it."""

import itertools
import random
from collections.abc import Sequence

import pytest
from fake_engine import END, VOCAB_SIZE, FakeExecutor, echo, make_engine, says

from sarathi.core.scheduler import RequestTooLongError
from sarathi.engine import core
from sarathi.engine.llm_engine import EngineShutDownError, LLMEngine
from sarathi.engine.outputs import RequestOutput
from sarathi.messages import SchedulerOutput, StepResult
from sarathi.metrics.store import MetricsStore
from sarathi.sampling_params import SamplingParams


def run(engine: LLMEngine) -> dict[str, list[RequestOutput]]:
    """All outputs of each request, until there is no work; never forgets to check the books."""
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.core.scheduler.check_integrity()
    return outputs


def answer(engine: LLMEngine, prompt: str | Sequence[int], **params: object) -> RequestOutput:
    engine.add_request("only", prompt, SamplingParams(**{"max_tokens": 50, **params}))
    return run(engine)["only"][-1]


def test_text_streams_and_the_end_token_is_counted_but_not_shown() -> None:
    engine = make_engine(says("Grüße, 世界 🙂"))
    engine.add_request("a", "hello\0", SamplingParams(max_tokens=50))
    outputs = [output.outputs[0] for output in run(engine)["a"]]
    assert "".join(output.delta for output in outputs) == outputs[-1].text == "Grüße, 世界 🙂"
    assert [output.num_tokens for output in outputs] == list(range(1, len(outputs) + 1))
    assert outputs[-1].token_ids == [*"Grüße, 世界 🙂".encode(), END]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", None)
    assert not any("\ufffd" in output.text for output in outputs)


def test_an_output_stays_what_it_was_when_its_request_goes_on() -> None:
    engine = make_engine(says("abcdef"))
    engine.add_request("a", [0], SamplingParams(max_tokens=50, logprobs=1))
    outputs = [output.outputs[0] for output in run(engine)["a"]]
    assert [output.text for output in outputs[:3]] == ["a", "ab", "abc"]
    assert (
        [len(output.token_ids) for output in outputs[:3]]
        == [len(output.logprobs or ()) for output in outputs[:3]]
        == [1, 2, 3]
    )


def test_max_tokens_ends_by_length_and_flushes_half_a_character() -> None:
    engine = make_engine(says("é" * 9))
    output = answer(engine, [0], max_tokens=3).outputs[0]
    assert (output.text, output.finish_reason) == ("é\ufffd", "length")


@pytest.mark.parametrize("stop", ["wor", "w", "d!", " world!"])
def test_stop_strings_end_the_request_and_are_cut(stop: str) -> None:
    engine = make_engine(says("hello world! and more"))
    outputs = answer(engine, [0], stop=["never", stop]).outputs[0]
    assert outputs.text == "hello world! and more".partition(stop)[0]
    assert (outputs.finish_reason, outputs.stop_reason) == ("stop", stop)
    assert bytes(outputs.token_ids).decode().endswith(stop)
    assert engine.core.executor.memory_stats().mapped_bytes == 0


def test_a_stop_string_completed_by_the_last_allowed_token_counts_as_a_stop() -> None:
    output = answer(make_engine(says("abc")), [0], stop="bc", max_tokens=3).outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("a", "stop", "bc")


def test_what_could_begin_a_stop_string_comes_out_at_the_end() -> None:
    engine = make_engine(says("so st"))
    engine.add_request("a", [0], SamplingParams(max_tokens=50, stop="stop"))
    outputs = [output.outputs[0] for output in run(engine)["a"]]
    assert [output.text for output in outputs] == ["", "so", "so ", "so ", "so ", "so st"]


def test_stop_tokens_end_with_their_id_as_the_reason_and_are_not_shown() -> None:
    output = answer(make_engine(says("abc")), [0], stop_token_ids=[ord("b")]).outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("a", "stop", ord("b"))


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (1, "a"), (2, "axb"), (3, "axb"), (4, "axbxc")])
def test_min_tokens_lets_stop_strings_pass(min_tokens: int, text: str) -> None:
    """One that is complete with the token of that number passes too, as in vLLM."""
    output = answer(make_engine(says("axbxc")), [0], stop="x", min_tokens=min_tokens).outputs[0]
    assert (output.text, output.stop_reason) == (text, "x" if len(text) < 5 else None)


def test_logprobs_name_the_chosen_token_first() -> None:
    output = answer(make_engine(says("z")), [0], logprobs=3, max_tokens=1).outputs[0]
    assert output.logprobs is not None
    assert list(output.logprobs[0]) == [ord("z"), 0, 1, 2]
    assert output.logprobs[0][ord("z")] == (-0.5, "z")


def test_n_answers_have_seeds_of_their_own_that_follow_from_the_given_one() -> None:
    def texts(seed: int) -> list[list[int]]:
        output = answer(make_engine(), [5, 6], n=4, seed=seed, max_tokens=8)
        assert [each.index for each in output.outputs] == [0, 1, 2, 3]
        return [each.token_ids for each in output.outputs]

    first = texts(7)
    assert first == texts(7) and first != texts(8)
    assert len(set(map(tuple, first))) == 4
    assert first[0] == answer(make_engine(), [5, 6], seed=7, max_tokens=8).outputs[0].token_ids


def test_n_answers_end_one_by_one_and_the_request_with_the_last() -> None:
    def next_token(tokens: Sequence[int], params: SamplingParams) -> int:
        return END if len(tokens) > 2 + (params.seed or 0) % 5 else 65

    engine = make_engine(next_token)
    engine.add_request("a", [1, 2], SamplingParams(n=5, seed=3, max_tokens=20))
    outputs = run(engine)["a"]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for output in outputs[-1].outputs:
        deltas = [each.outputs[output.index].delta for each in outputs]
        assert "".join(deltas) == output.text == "A" * (output.num_tokens - 1)
    assert engine.num_unfinished == 0


def test_abort_returns_the_last_output_and_frees_the_memory() -> None:
    engine = make_engine(says("abc" * 30))
    for request_id, n in (("keep", 1), ("drop", 2)):
        engine.add_request(request_id, [0], SamplingParams(max_tokens=60, n=n))
    for _ in range(5):
        engine.step()
    assert engine.is_unfinished("drop") and not engine.is_unfinished("unknown")
    last = engine.abort("drop")
    assert not engine.is_unfinished("drop")
    assert last is not None and last.finished
    assert [(output.text, output.finish_reason) for output in last.outputs] == [("abcab", "abort")] * 2
    assert engine.abort("drop") is None and engine.abort("unknown") is None
    outputs = run(engine)
    assert list(outputs) == ["keep"] and outputs["keep"][-1].outputs[0].text == "abc" * 20
    assert engine.core.executor.memory_stats().mapped_bytes == 0


def test_abort_before_the_first_step_gives_an_empty_answer() -> None:
    engine = make_engine()
    engine.add_request("a", [1], SamplingParams())
    last = engine.abort("a")
    assert last is not None and last.outputs[0].token_ids == [] and last.outputs[0].finish_reason == "abort"
    assert run(engine) == {}


def test_what_is_shown_of_special_tokens_and_stops() -> None:
    def text(**params: object) -> str:
        return answer(make_engine(says("abcSTOPd")), [0], **params).outputs[0].text

    assert text() == text(skip_special_tokens=False) == "abcSTOPd"  # the end token itself is no part of the text
    shown = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    assert text(**shown) == "abcSTOPd<end>"
    assert text(**shown, stop="STOP") == text(include_stop_str_in_output=True, stop="STOP") == "abcSTOP"
    assert text(include_stop_str_in_output=True, stop_token_ids=[ord("b")]) == "ab"
    assert text(include_stop_str_in_output=True) == "abcSTOPd"
    assert text(ignore_eos=True, max_tokens=10, skip_special_tokens=False) == "abcSTOPd<end><end>"


def test_without_detokenization_there_are_token_ids_alone() -> None:
    output = answer(make_engine(says("ab")), [0], detokenize=False, logprobs=1).outputs[0]
    assert (output.text, output.token_ids, output.finish_reason) == ("", [97, 98, END], "stop")
    assert output.logprobs is not None and output.logprobs[0][97] == (-0.5, "97")
    with pytest.raises(ValueError, match="stop strings need detokenize=True"):
        SamplingParams(detokenize=False, stop="x")


def test_bad_words_reach_the_model_as_token_ids_in_the_ways_they_are_written() -> None:
    seen = []

    def next_token(tokens: Sequence[int], params: SamplingParams) -> int:
        seen.append(params.bad_words)
        return END

    answer(make_engine(next_token), [0], bad_words=["ab", [7, 8, 9], " c"])
    assert [list(map(tuple, each)) for each in seen] == [[(97, 98), (7, 8, 9), (99,)]]
    with pytest.raises(ValueError, match="bad_words holds 'x': this model has no tokenizer, give lists of token ids"):
        make_engine(has_tokenizer=False).add_request("a", [1], SamplingParams(bad_words=["x"]))


BAD_REQUESTS = [
    ("", {}, "the prompt is empty"),
    ([], {}, "the prompt is empty"),
    ([3, VOCAB_SIZE], {}, f"prompt holds token id {VOCAB_SIZE}: it must be from 0 to {VOCAB_SIZE - 1}"),
    ([-1], {}, "prompt holds token id -1"),
    ([1.5], {}, "must be text or a list of token ids"),
    ([[1]], {}, "must be text or a list of token ids"),
    (7, {}, "must be text or a list of token ids"),
    ([1] * 200, {}, "200"),
    ([1], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids holds token id"),
    ([1], {"logit_bias": {9999: 1.0}}, "logit_bias holds token id 9999"),
    ([1], {"logprobs": 5000}, "logprobs is 5000"),
    ([1], {"prompt_logprobs": 5000}, "prompt_logprobs is 5000"),
    ([1], {"bad_words": [[1, 300]]}, "bad_words holds token id 300"),
    ([1], {"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids holds token id"),
    ([1], {"allowed_token_ids": [END], "min_tokens": 1}, rf"allowed_token_ids is \({END},\): bad_words and min_tokens"),
    ([1], {"allowed_token_ids": [7, 8], "stop_token_ids": [7], "min_tokens": 1, "bad_words": [[8]]}, "exclude every"),
    ([1], {"bad_words": [[each] for each in range(VOCAB_SIZE)]}, "allowed_token_ids is None: bad_words and min_tokens"),
]


@pytest.mark.parametrize(("prompt", "params", "message"), BAD_REQUESTS)
def test_a_bad_request_is_refused_and_changes_nothing(prompt: object, params: dict, message: str) -> None:
    engine = make_engine(says("fine"))
    engine.add_request("good", [0], SamplingParams(max_tokens=10))
    with pytest.raises(ValueError, match=message):
        engine.add_request("bad", prompt, SamplingParams(n=2, **params))  # type: ignore[arg-type]
    outputs = run(engine)
    assert list(outputs) == ["good"] and outputs["good"][-1].outputs[0].text == "fine"
    engine.add_request("bad", [0], SamplingParams(max_tokens=10))  # its id is free
    assert run(engine)["bad"][-1].outputs[0].text == "fine"


def test_too_long_is_the_schedulers_error_with_the_numbers() -> None:
    with pytest.raises(RequestTooLongError, match=r"300 tokens.*200"):
        make_engine().add_request("long", [1] * 300, SamplingParams())


def test_metrics_have_a_row_of_what_is_too_long_and_of_no_other_refusal() -> None:
    metrics = MetricsStore()
    engine = make_engine(says("fine"), metrics=metrics)
    engine.add_request("good", [0], SamplingParams(max_tokens=10))
    for request_id, prompt in (("long", [1] * 300), ("good", [0]), ("empty", [])):
        with pytest.raises(ValueError):
            engine.add_request(request_id, prompt, SamplingParams(n=2))
    run(engine)
    ended = [(record.request_id, record.finish_reason) for record in metrics.records().requests]
    assert ended == [("0_good", "stop"), ("0_long", "error"), ("0_long#1", "error")]


def test_an_id_in_use_is_refused_also_where_it_is_one_of_n() -> None:
    engine = make_engine(says("x"))
    engine.add_request("a", [0], SamplingParams(n=2))
    for taken in ("a", "a#1"):
        with pytest.raises(ValueError, match="a"):
            engine.add_request(taken, [0], SamplingParams())
    engine.add_request("b#1", [0], SamplingParams())
    with pytest.raises(ValueError, match="b#1"):
        engine.add_request("b", [0], SamplingParams(n=2))
    assert set(run(engine)) == {"a", "b#1"}


def test_an_id_is_in_use_until_the_last_of_its_n_has_ended() -> None:
    engine = make_engine(lambda tokens, params: END if params.seed == 0 else 65)
    engine.add_request("a", [1, 2], SamplingParams(n=2, seed=0, max_tokens=10))
    [output] = engine.step()
    engine.step()  # the worker has heard of the one that ended
    assert [each.finish_reason for each in output.outputs] == ["stop", None]
    for taken in ("a", "a#1"):
        with pytest.raises(ValueError, match=taken):
            engine.add_request(taken, [1, 2], SamplingParams())
    assert run(engine)["a"][-1].finished


def test_without_a_tokenizer_token_ids_work_and_text_is_refused() -> None:
    engine = make_engine(has_tokenizer=False)
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.add_request("a", "text", SamplingParams())
    with pytest.raises(ValueError, match="use stop_token_ids"):
        engine.add_request("a", [1], SamplingParams(stop="x"))
    output = answer(engine, [1, 2], max_tokens=5, logprobs=0).outputs[0]
    assert output.text == "" and len(output.token_ids) == 5 and output.finish_reason == "length"


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on() -> None:
    engine = make_engine(says("fine"))
    for index in range(3):
        engine.add_request(str(index), [index, 0], SamplingParams(n=2, max_tokens=10))
    engine.step()
    engine.core.executor.fail_next = RuntimeError("device lost")  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="device lost"):
        engine.step()
    assert engine.num_unfinished == 0
    assert answer(engine, [0]).outputs[0].text == "fine"
    assert engine.core.executor.memory_stats().mapped_bytes == 0


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["memory.allocate", "memory.free", "update", "schedule"])
def test_an_interrupt_anywhere_in_a_step_leaves_an_engine_that_works(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = MetricsStore()
    engine = make_engine(says("fine"), metrics=metrics)
    engine.add_request("running", [0], SamplingParams(n=2, max_tokens=2))
    engine.step()
    engine.add_request("waiting", [0], SamplingParams(max_tokens=2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        scheduler = engine.core.scheduler
        owner, name = (scheduler.block_space_manager, where[7:]) if where.startswith("memory.") else (scheduler, where)
        patch.setattr(owner, name, interrupt)
        run(engine)
    assert engine.num_unfinished == 0
    engine.core.scheduler.check_integrity()
    assert answer(engine, [0]).outputs[0].text == "fine"
    assert engine.core.executor.memory_stats().mapped_bytes == 0
    assert None not in [record.finish_reason for record in metrics.records().requests]


def test_metrics_hear_the_finish_reason_that_the_client_hears() -> None:
    metrics = MetricsStore()
    engine = make_engine(says("abcSTOP"), metrics=metrics)
    output = answer(engine, [0], max_tokens=7, stop=["STOP"]).outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("abc", "stop", "STOP")
    assert [record.finish_reason for record in metrics.records().requests] == ["stop"]


def test_together_equals_alone_whatever_the_chunks_and_however_small_the_cache() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 60))] for _ in range(12)]
    params = [
        SamplingParams(max_tokens=rng.randint(1, 30), seed=rng.randrange(99), n=rng.randint(1, 2)) for _ in prompts
    ]

    def ids(output: RequestOutput) -> list[list[int]]:
        return [each.token_ids for each in output.outputs]

    alone = []
    for prompt, each in zip(prompts, params, strict=True):
        engine = make_engine()
        engine.add_request("x", prompt, each)
        alone.append(ids(run(engine)["x"][-1]))
    for rows, chunk_size in itertools.product((95, 1000), (1, 7, 512)):
        engine = make_engine(echo, rows, chunk_size=chunk_size)
        for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(str(number), prompt, each)
        outputs = run(engine)
        assert [ids(outputs[str(number)][-1]) for number in range(len(prompts))] == alone, (rows, chunk_size)


def test_times_are_in_order_and_by_the_clock_handed_in() -> None:
    ticks = itertools.count(100)
    engine = make_engine(says("abc"), clock=lambda: float(next(ticks)), max_num_seqs=1)
    for request_id in ("first", "second"):
        engine.add_request(request_id, [0], SamplingParams(max_tokens=10))
    outputs = run(engine)
    for request_id in ("first", "second"):
        times = outputs[request_id][-1].metrics
        order = [times.arrival_time_s, times.first_scheduled_time_s, times.first_token_time_s, times.finish_time_s]
        assert None not in order and order == sorted(order) and order[0] >= 100
    waited = outputs["second"][-1].metrics.first_scheduled_time_s
    assert waited is not None and waited > (outputs["first"][-1].metrics.first_token_time_s or 0)


def test_shutdown_reaches_the_executor() -> None:
    engine = make_engine()
    engine.shutdown()
    assert engine.core.executor.is_shut_down  # type: ignore[attr-defined]


def test_after_shutdown_there_is_no_work_and_requests_are_refused() -> None:
    engine = make_engine()
    engine.add_request("a", [1], SamplingParams())
    engine.step()
    engine.shutdown()
    engine.shutdown()
    assert not engine.has_work and engine.num_unfinished == 0
    with pytest.raises(EngineShutDownError, match="the engine is shut down: it takes no more requests"):
        engine.add_request("b", [1], SamplingParams())
    assert not engine.has_work


class OverlappingExecutor(FakeExecutor):
    """Two steps in flight, as on a GPU; keeps a log of what it is asked for, in order."""

    def __init__(self) -> None:
        super().__init__(echo)
        self.max_in_flight = 2
        self.log: list[str] = []

    def launch(self, out: SchedulerOutput) -> "LoggedStep":  # type: ignore[override]
        self.log.append(f"launch {out.step_id}")
        return LoggedStep(self, out)

    def wait(self) -> None:
        self.log.append("wait")

    def shutdown(self) -> None:
        self.log.append("shutdown")


class LoggedStep:
    def __init__(self, executor: OverlappingExecutor, out: SchedulerOutput) -> None:
        self._executor, self._out = executor, out

    def result(self) -> StepResult:
        self._executor.log.append(f"result {self._out.step_id}")
        return self._executor.execute(self._out)


def make_overlapping_engine() -> tuple[LLMEngine, list[str]]:
    engine = make_engine()
    engine.core.executor = executor = OverlappingExecutor()
    engine.add_request("a", [1, 2], SamplingParams(max_tokens=50))
    return engine, executor.log


def test_shutdown_waits_for_the_steps_in_flight() -> None:
    engine, log = make_overlapping_engine()
    engine.step()
    engine.step()
    engine.shutdown()
    assert log == ["launch 0", "launch 1", "result 0", "result 1", "wait", "shutdown"]
    assert engine.num_unfinished == 0


def test_shutdown_reaches_the_executor_also_where_ctrl_c_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, log = make_overlapping_engine()
    engine.step()
    monkeypatch.setattr(LoggedStep, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.shutdown()
    assert log[-1] == "shutdown"


def test_another_ctrl_c_while_steps_are_waited_for_leaves_none_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, log = make_overlapping_engine()
    engine.step()
    monkeypatch.setattr(engine.core.executor, "launch", interrupt)
    monkeypatch.setattr(LoggedStep, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert log == ["launch 0", "wait"] and engine.num_unfinished == 0


def test_ctrl_c_just_after_a_launch_waits_for_that_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, log = make_overlapping_engine()
    engine.step()
    monkeypatch.setattr(core, "InFlightStep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert log == ["launch 0", "launch 1", "result 0", "wait"]
    assert engine.num_unfinished == 0
