"""Compare our server with vLLM's on chats over HTTP at several rates: server.csv, server.json.

    python scripts/benchmark_server.py --servers vllm,sarathi --rates 8,16,24,inf --output DIR     # on a GPU
    python scripts/benchmark_server.py --test --servers sarathi --stages rates,overhead            # on a CPU

The client of `sarathi bench serve` sends prompts of token ids with chat-like lengths (medians: 230 prompt, 190 output
tokens); outputs have fixed lengths. Each rate runs for --seconds with the same requests at the same times for each
server; "inf" sends --num-prompts requests at once. Stage overhead compares our server with the same engine in this
process, with 32 streams and with one.
"""

import json
import math
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarathi import LLM, SamplingParams
from sarathi.benchmark.config.program import add_stages, engine_parser, parse, positive
from sarathi.benchmark.engines import servers
from sarathi.benchmark.engines.ours import find_model
from sarathi.benchmark.records import Budget, Record, Table
from sarathi.benchmark.serve import results
from sarathi.benchmark.serve.client import OutgoingRequest, RequestResult
from sarathi.benchmark.serve.load import LoadOutcome, LoadPlan, run_load
from sarathi.benchmark.workload.intervals import gamma_arrivals
from sarathi.benchmark.workload.lengths import lognormal_requests
from sarathi.entrypoints.script import run_script

STAGES = ("rates", "overhead")
METRICS = ("ttft", "itl", "tpot", "e2el")
PERCENTILES = (50.0, 99.0)
STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS, SINGLES = 32, 32, 64, 20  # of stage overhead
IN_PROCESS = "engine in this process"


class Measurement:
    """The tables of one run, and the servers' results."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.table = Table(options.output / "server.csv", servers=options.servers)
        self.details: dict[str, Any] = {}
        self.folder = servers.save_model(
            find_model(options.model), options.max_model_len, Path(tempfile.mkdtemp(prefix="sarathi-model-"))
        )
        self._vocab_size: int = json.loads((self.folder / "config.json").read_text())["vocab_size"]

    def with_server(self, name: str, measure: Callable[[str, str], None]) -> None:
        """Start a server and call `measure` with its backend and address."""
        port = servers.free_port()
        command, url = self._command(name, port), f"http://127.0.0.1:{port}"
        log = self.options.output / f"{name}.log"
        with servers.running(command, url, log, self.options.start_limit) as started:
            self._add("start", 1, command.backend, started.start_s, "s")
            measure(command.backend, url)

    def rates(self, backend: str, url: str) -> None:
        """Measure every rate, lowest first, after a warm-up."""
        self._send(url, self._chats(16.0, 16))
        for rate in self.options.rates:
            count = self.options.num_prompts if math.isinf(rate) else max(round(rate * self.options.seconds), 8)
            outcome = self._send(url, self._chats(rate, count))
            self._add_load(f"chats at {rate:g}/s", backend, outcome)

    def overhead(self, backend: str, url: str) -> None:
        """Measure many streams, then one at a time, over HTTP and in this process."""
        shape = [(PROMPT_TOKENS, OUTPUT_TOKENS)] * STREAMS
        outcome = self._send(url, self._requests(shape, [0.0] * STREAMS))
        throughput = results.compute(outcome.results, outcome.duration_s, {})["output_throughput"]
        self._add("streams", STREAMS, backend, throughput, "output tokens/s")
        singles = [self._send(url, self._requests(shape[:1], [0.0])).results[0].ttft_s for _ in range(SINGLES)]
        self._add("first token", 1, backend, 1e3 * statistics.median(singles), "ms")

    def in_process(self) -> None:
        """Measure the same engine without a server, and compare the server's records with it."""
        options = self.options
        with LLM(
            str(self.folder), load_format="dummy", max_model_len=options.max_model_len, device=options.device,
            max_num_seqs=options.max_num_seqs, chunk_size=options.chunk_size, attention_backend=options.backend,
            memory_bytes=options.memory_bytes, prefix_caching=False,
        ) as llm:  # fmt: skip
            prompts = [self._ids(PROMPT_TOKENS, number) for number in range(STREAMS)]
            params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
            llm.generate(prompts, params, use_tqdm=False)
            start_s = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            rate = STREAMS * OUTPUT_TOKENS / (time.perf_counter() - start_s)
            self._compare("streams", STREAMS, rate, "output tokens/s")
            firsts = [_first_token_s(llm, prompts[0], params) for _ in range(SINGLES)]
            self._compare("first token", 1, 1e3 * statistics.median(firsts), "ms")

    def save(self) -> None:
        """Write the statistics of each load, with the keys of `vllm bench serve`."""
        (self.options.output / "server.json").write_text(json.dumps(self.details, indent=2) + "\n")

    def compare_servers(self) -> None:
        """Give each of our records the other server's as its reference."""
        records = list(self.table.records)
        others = {record.task: record for record in records if record.backend == "vllm"}
        for record in records:
            if record.backend == "sarathi" and record.task in others:
                self.table.compare(record, others[record.task])

    def _command(self, name: str, port: int) -> servers.ServerCommand:
        options = self.options
        limits = servers.ServerLimits(options.max_model_len, options.max_num_seqs, options.chunk_size)
        if name == "vllm":
            return servers.vllm_server(self.folder, port, limits)
        memory = () if options.memory_bytes is None else ("--memory-bytes", options.memory_bytes)
        ours = ("--device", options.device, "--attention-backend", options.backend, *memory)
        return servers.our_server(self.folder, port, limits, ours)

    def _chats(self, rate: float, count: int) -> list[OutgoingRequest]:
        seed = self.options.seed
        shapes = lognormal_requests(count, seed, self.options.max_model_len)
        rng = np.random.default_rng([seed, 1])
        times = [0.0] * count if math.isinf(rate) else gamma_arrivals(rate, 1.0, count, rng).tolist()
        return self._requests(shapes, times)

    def _requests(self, shapes: Sequence[tuple[int, int]], times: Sequence[float]) -> list[OutgoingRequest]:
        return [
            OutgoingRequest(at_s, self._ids(prompt, number), prompt, output)
            for number, (at_s, (prompt, output)) in enumerate(zip(times, shapes, strict=True))
        ]

    def _ids(self, count: int, number: int) -> list[int]:
        rng = np.random.default_rng([self.options.seed, 2, number])
        ids: list[int] = rng.integers(300, self._vocab_size - 1, count).tolist()
        return ids

    def _send(self, url: str, requests: Sequence[OutgoingRequest]) -> LoadOutcome:
        body = {"temperature": 0.0, "ignore_eos": True}
        plan = LoadPlan(url, "/v1/completions", False, servers.NAME, body, {}, requests, show_progress=False)
        outcome = run_load(plan)
        if errors := sorted({each.error for each in outcome.results if each.error}):
            raise RuntimeError(f"{len(errors)} kinds of errors, the first: {errors[0]}")
        _check_lengths(requests, outcome.results)
        return outcome

    def _add_load(self, work: str, backend: str, outcome: LoadOutcome) -> None:
        found = results.compute(outcome.results, outcome.duration_s, {})
        found |= results.statistics(results.latencies_ms(outcome.results), METRICS, PERCENTILES)
        self.details[f"{backend}, {work}"] = found
        self.save()
        count = len(outcome.results)
        self._add(work, count, backend, found["output_throughput"], "output tokens/s")
        for metric in METRICS:
            for percentile in PERCENTILES:
                value = found[f"p{percentile:g}_{metric}_ms"]
                self._add(f"{work}, {metric} P{percentile:g}", count, backend, value, "ms")

    def _add(self, work: str, batch: int, backend: str, value: float, unit: str) -> Record:
        record = Record(self.options.model, work, backend, batch, 0, value, unit)
        self.table.add(record)
        return record

    def _compare(self, work: str, batch: int, value: float, unit: str) -> None:
        reference = self._add(work, batch, IN_PROCESS, value, unit)
        for record in [each for each in self.table.records if each.backend == "sarathi"]:
            if record.task == reference.task:
                self.table.compare(record, reference)


def _first_token_s(llm: LLM, prompt: list[int], params: SamplingParams) -> float:
    start_s = time.perf_counter()
    for _ in llm.stream(prompt, params):
        return time.perf_counter() - start_s
    raise AssertionError("an answer has a token")


def _check_lengths(requests: Sequence[OutgoingRequest], answers: Sequence[RequestResult]) -> None:
    """RuntimeError if a server returned another number of tokens than requested."""
    asked, given = sum(each.max_tokens for each in requests), sum(each.output_tokens for each in answers)
    if asked != given:
        raise RuntimeError(f"{asked} output tokens were asked for, and {given} came")


def read_options() -> Namespace:
    parser = engine_parser(__doc__, "results/server")
    add_stages(parser, STAGES)
    parser.add_argument("--servers", type=lambda text: text.split(","), default=["sarathi"], help="of sarathi,vllm")
    parser.add_argument("--rates", type=lambda text: [float(each) for each in text.split(",")], default=[8, math.inf])
    parser.add_argument("--seconds", type=float, default=20.0, help="for which each rate is sent")
    parser.add_argument("--num-prompts", type=positive, default=1000, help="of rate inf")
    parser.add_argument("--start-limit", type=float, default=240.0, help="seconds in which a server must be ready")
    parser.set_defaults(max_model_len=8192, chunk_size=8192)
    test = {"rates": "2,inf", "seconds": 2, "num_prompts": 16}
    return parse(parser, test)


def main() -> int:
    """Measure; returns the exit code."""
    options = read_options()
    measurement = Measurement(options)
    budget = Budget(options.budget, measurement.table.attempts)
    if "rates" in options.stages:
        budget.run(
            (f"{name}, rates", lambda name=name: measurement.with_server(name, measurement.rates))
            for name in options.servers
        )
        measurement.compare_servers()
    if "overhead" in options.stages:
        with_server = ("server, overhead", lambda: measurement.with_server("sarathi", measurement.overhead))
        budget.run([with_server, ("engine, overhead", measurement.in_process)])
    measurement.save()
    return measurement.table.attempts.exit_code()


if __name__ == "__main__":
    run_script(main)
