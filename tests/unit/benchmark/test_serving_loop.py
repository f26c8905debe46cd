"""The loop on a real engine and scheduler over an executor that only takes time: arrivals, limits, refusals, ^C."""

import time
from collections.abc import Sequence

import numpy as np
import pytest

from sarathi.benchmark.run.outcome import COMPLETED, INTERRUPTED, TIME_LIMIT
from sarathi.benchmark.run.serving_loop import NumberedSpec, ServingLoop
from sarathi.benchmark.workload import RequestSpec
from sarathi.benchmark.workload.prompts import PromptMaker
from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.core.scheduler import make_scheduler
from sarathi.engine.core import EngineCore
from sarathi.engine.llm_engine import LLMEngine
from sarathi.messages import (
    CacheCapacity,
    CompletedStep,
    MemoryStats,
    Resolution,
    SampledToken,
    SchedulerOutput,
    StepResult,
)
from sarathi.metrics import MetricsStore

SEED = 0  # set anew for each test: see tests/conftest.py
CAPACITY = CacheCapacity(rows=64, token_bytes=1, page_bytes=16)
MAX_MODEL_LEN = 200


class SleepyExecutor:
    """Steps of a given length that sample token 5."""

    vocab_size, max_model_len, capacity = 50, MAX_MODEL_LEN, CAPACITY
    token_bytes, resolution = 1, Resolution("no_op_vattn", "cpu", "float32", 2.0**-23)
    max_in_flight, takes_functions = 1, True

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def launch(self, out: SchedulerOutput) -> CompletedStep:
        time.sleep(self._step_s if out.chunks else 0)
        tokens = tuple(SampledToken(chunk.request_id, 5) for chunk in out.chunks if chunk.samples)
        return CompletedStep(StepResult(out.step_id, tokens, self._step_s))

    def wait(self) -> None:
        pass

    def memory_stats(self) -> MemoryStats:
        return MemoryStats()

    def shutdown(self) -> None:
        pass


class Bench:
    """An engine and its store."""

    def __init__(self, step_s: float = 0.002, after_step=lambda outputs: None) -> None:
        scheduler = make_scheduler(SchedulerConfig(max_num_seqs=8), VirtualBlockSpaceManager(CAPACITY), MAX_MODEL_LEN)
        self.store = MetricsStore()
        self.engine = LLMEngine(EngineCore(scheduler, SleepyExecutor(step_s)), None, metrics=self.store)
        self.loop = ServingLoop(self.engine, PromptMaker(SEED, 50), after_step, keep_responses=True)

    def serve(self, specs: Sequence[RequestSpec], limit_s: float = 30.0):
        return self.loop.serve([NumberedSpec(number, spec) for number, spec in enumerate(specs)], limit_s)


def test_requests_arrive_at_their_times() -> None:
    rng = np.random.default_rng(SEED)
    print(f"seed {SEED}")
    specs = [RequestSpec(at_s, int(rng.integers(1, 60)), int(rng.integers(1, 9))) for at_s in (0.0, 0.05, 0.05, 0.3)]
    bench = Bench()
    served = bench.serve(specs)
    assert (served.ended, served.num_finished, served.refused) == (COMPLETED, 4, {})
    records = bench.store.records().requests
    arrivals = [record.arrived_at_s - records[0].arrived_at_s for record in records]
    assert arrivals == pytest.approx([0.0, 0.05, 0.05, 0.3])
    for record, spec in zip(records, specs, strict=True):
        assert record.request_num_prefill_tokens == spec.num_prefill_tokens
        assert record.request_num_decode_tokens == spec.num_decode_tokens
        assert record.request_scheduling_delay >= 0
    assert 0.3 <= served.duration_s < 60
    assert [
        len(response["token_ids"]) for response in sorted(served.responses, key=lambda r: int(r["request_id"]))
    ] == [spec.num_decode_tokens for spec in specs]


def test_the_time_limit_ends_a_run_with_what_there_is() -> None:
    bench = Bench(step_s=0.01)
    served = bench.serve([RequestSpec(0.0, 5, 3), RequestSpec(0.0, 5, 190)], limit_s=0.5)
    assert (served.ended, served.num_finished) == (TIME_LIMIT, 1)
    assert 0.5 <= served.duration_s < 60
    done, cut = bench.store.records().requests
    assert done.is_complete and not cut.is_complete and cut.finish_reason == "abort"
    assert not bench.engine.has_work


def test_waiting_for_an_arrival_respects_the_time_limit() -> None:
    served = Bench().serve([RequestSpec(0.0, 5, 1), RequestSpec(60.0, 5, 1)], limit_s=0.5)
    assert (served.ended, served.num_finished) == (TIME_LIMIT, 1)
    assert 0.5 <= served.duration_s < 60


def test_an_interrupt_ends_a_run_with_what_there_is() -> None:
    steps = []

    def interrupt(outputs: object) -> None:
        steps.append(outputs)
        if len(steps) == 5:
            raise KeyboardInterrupt

    bench = Bench(after_step=interrupt)
    served = bench.serve([RequestSpec(0.0, 5, 2), RequestSpec(0.0, 5, 50)])
    assert (served.ended, served.num_finished) == (INTERRUPTED, 1)
    assert len(bench.store.records().steps) == 5
    assert not bench.engine.has_work


def test_a_request_that_is_too_long_is_refused_by_name_and_the_rest_are_served() -> None:
    bench = Bench()
    served = bench.serve([RequestSpec(0.0, MAX_MODEL_LEN + 1, 1), RequestSpec(0.0, 5, 2)])
    assert (served.ended, served.num_finished) == (COMPLETED, 1)
    assert list(served.refused) == ["0"] and str(MAX_MODEL_LEN) in served.refused["0"]
    assert [record.request_num_ignored for record in bench.store.records().requests] == [1, 0]


def test_engine_serves_again_after_an_unfinished_run() -> None:
    bench = Bench()
    bench.serve([RequestSpec(0.0, 5, 190)] * 8, limit_s=0.05)
    bench.store.reset()
    served = bench.serve([RequestSpec(0.0, 100, 4)] * 8)
    assert (served.ended, served.num_finished) == (COMPLETED, 8)
    assert len(bench.store.records().requests) == 8
