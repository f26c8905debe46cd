"""SmolLM2 on real prompts through scheduler and worker: every token equals transformers' own greedy output."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from smollm2 import PROMPTS, greedy

from sarathi.config.backend import BackendSpec
from sarathi.config.load import make_config
from sarathi.config.schema import SchedulerConfig
from sarathi.core.factory import make_block_space_manager
from sarathi.core.scheduler import make_scheduler
from sarathi.engine.tokenizer.load import load_tokenizer
from sarathi.executor.uniproc import UniprocExecutor
from sarathi.model_executor.loader.gguf_checkpoint import GGUFCheckpoint
from sarathi.model_executor.loader.source import resolve_model
from sarathi.request import Request
from sarathi.sampling_params import SamplingParams

NUM_TOKENS = 16
UNLIMITED = 8192
BACKENDS = (
    "sdpa_vattn", "sdpa_paged_16", "sdpa_vattn_megacache", "sdpa_vattn_sync", "sdpa_paged_32",
    "sdpa_vattn_megacache_sync", "sdpa_vattn_sync_8kb", "sdpa_vattn_megacache_sync_128kb",
)  # fmt: skip
# Tokens of a request in a step, requests at once.
SCHEDULES = ((1, 32), (7, 32), (64, 5), (UNLIMITED, 32), (UNLIMITED, 1))
ONE_EACH = {"sdpa_vattn": (64, 32), "sdpa_paged_16": (7, 32), "sdpa_vattn_megacache": (UNLIMITED, 5)}
PREEMPTING = ("sdpa_paged_16", "sdpa_vattn_megacache", "sdpa_vattn_sync_8kb")  # rows that 16 tokens outgrow


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    return [tuple(tokenizer.encode(prompt)) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def continuations(reference) -> Callable[[list[tuple[int, ...]]], list[list[int]]]:
    """What transformers writes after each of the prompts."""
    computed = cache(partial(greedy, reference, num_tokens=NUM_TOKENS))
    return lambda prompts: [computed(prompt) for prompt in prompts]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> BackendSpec:
    return BackendSpec.parse(request.param)


@pytest.fixture(scope="module")
def executor(backend: BackendSpec) -> Iterator[UniprocExecutor]:
    executor = UniprocExecutor(
        make_config(attention_backend=backend, memory_bytes=2**29, max_num_seqs=32, device="cpu")
    )
    yield executor
    executor.shutdown()


def generate(
    executor: UniprocExecutor,
    backend: BackendSpec,
    prompts: list[tuple[int, ...]],
    config: SchedulerConfig,
    rows: int | None = None,
) -> list[Request]:
    """Runs all prompts to their end; with `rows` the block space manager counts on no more memory than that."""
    capacity = executor.capacity if rows is None else replace(executor.capacity, rows=rows)
    scheduler = make_scheduler(config, make_block_space_manager(backend, capacity), executor.max_model_len)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    requests = [Request(f"r{index}", prompt, params) for index, prompt in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        out = scheduler.schedule()
        scheduler.update(out, executor.execute(out))
    executor.check_integrity()
    return requests


def scheduling(chunk: int, at_once: int) -> SchedulerConfig:
    return SchedulerConfig(
        chunk_size=UNLIMITED, max_chunk_per_request=chunk, max_num_seqs=at_once, max_num_partial_prefills=at_once
    )


def test_prompts_are_many_and_mixed(prompts) -> None:
    lengths = sorted(map(len, prompts))
    assert len(prompts) >= 24 and lengths[0] == 1 and lengths[-1] > 250


def test_weights_equal_transformers_reading_of_the_file(reference) -> None:
    tensors = {named.name: named.tensor for named in GGUFCheckpoint(resolve_model("smollm2-135m").path).tensors()}
    theirs = reference.state_dict()
    theirs.pop("lm_head.weight", None)
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("backend", ONE_EACH, indirect=True)
def test_outputs_equal_transformers(executor, backend, prompts, continuations) -> None:
    chosen = prompts[1::4]  # with the longest; the slow tests have all of them
    found = generate(executor, backend, chosen, scheduling(*ONE_EACH[str(backend)]))
    assert [request.output_token_ids for request in found] == continuations(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_backend_and_schedule_equals_transformers(executor, backend, prompts, continuations, schedule) -> None:
    chosen = prompts[SCHEDULES.index(schedule) % 3 :: 3]  # a backend gets all of them in three schedules
    found = generate(executor, backend, chosen, scheduling(*schedule))
    assert [request.output_token_ids for request in found] == continuations(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("backend", PREEMPTING, indirect=True)
def test_outputs_survive_preemption(executor, backend, prompts, continuations) -> None:
    longest = max(map(len, prompts)) + NUM_TOKENS
    rows = executor.capacity.rows_for(longest) + 3 * executor.capacity.rows_for(NUM_TOKENS)
    chosen = prompts[1::2]  # with the longest
    found = generate(executor, backend, chosen, scheduling(64, 32), rows)
    assert sum(request.num_preemptions for request in found) > 0
    assert [request.output_token_ids for request in found] == continuations(chosen)
