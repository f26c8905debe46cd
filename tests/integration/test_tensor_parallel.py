"""Tensor parallelism over processes, on the CPU: outputs, shortage on one rank, ranks that die or hang, refusals."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_ranks import start_interpreter
from http_server import wait_until
from process_tree import is_alive
from random_driver import RandomDriver
from rank_helpers import (
    BACKENDS,
    FAMILIES,
    GREEDY,
    TEXTS,
    check_family,
    check_greedy,
    check_that_a_kill_ends_waiting_commands,
    generate,
    make_executor,
    pids_of,
    settings_for,
    step_until_it_fails,
)
from short_rank import SHORT_STEPS
from tiny_models import EVERYTHING, TinyModel, build, largest_difference, random_prompts

from sarathi import LLM, SamplingParams
from sarathi.executor.ranks import multiproc
from sarathi.executor.ranks.group import RankError
from sarathi.messages import SchedulerOutput
from sarathi.model_executor.loader.gguf_checkpoint import GGUFCheckpoint
from sarathi.model_executor.loader.source import resolve_model
from sarathi.model_executor.parallel.sharding import Shard

pytestmark = pytest.mark.usefixtures("forked_ranks")
TWO = {"tensor_parallel_size": 2}
OTHERS = {"llama-with-biases": {}, "smollm2": {}, "yi": {}, "llama-dynamic": {}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_compute_what_transformers_computes(name: str, backend: str, tmp_path: Path) -> None:
    check_family(name, FAMILIES[name], tmp_path, attention_backend=backend, **TWO)


@pytest.mark.parametrize("name", OTHERS)
def test_biases_tied_heads_shared_kv_heads_and_rope_lengths(name: str, tmp_path: Path) -> None:
    check_family(name, OTHERS[name], tmp_path, **TWO)


@pytest.mark.parametrize("size", [3, 6])
def test_more_ranks_than_kv_heads(size: int, tmp_path: Path) -> None:
    model = build("yi", tmp_path, intermediate_size=84)
    executor = make_executor(model, tensor_parallel_size=size)
    prompts = dict(random_prompts(size, 2, 20))
    tokens = RandomDriver(executor, size).run(prompts, EVERYTHING, 3)
    executor.shutdown()
    assert max(largest_difference(model, prompt, tokens[name]) for name, prompt in prompts.items()) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_preemption_changes_nothing(tiny: TinyModel, backend: str) -> None:
    prompts = [[prompt[0]] * 110 + prompt for _, prompt in random_prompts(7, 6, 16)]  # a page holds 128 tokens
    settings = settings_for(tiny, **TWO, attention_backend=backend, memory_bytes=5 * 6 * 4096, chunk_size=100)
    outputs, preemptions = generate(settings, prompts, replace(GREEDY, max_tokens=25))
    assert preemptions
    check_greedy(outputs, tiny, prompts, 25)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shortage_on_one_rank_alone_fails_the_step_on_all(
    tiny: TinyModel, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        multiproc, "_PROGRAM", multiproc._PROGRAM.replace("sarathi.executor.ranks.process", "short_rank")
    )
    prompts = [prompt for _, prompt in random_prompts(8, 8, 40)]
    outputs, _ = generate(settings_for(tiny, **TWO, attention_backend=backend, chunk_size=64), prompts, GREEDY)
    assert caplog.text.count("memory ran out in step") == len(SHORT_STEPS)
    check_greedy(outputs, tiny, prompts, 12)


def test_drawn_tokens_are_those_of_one_rank(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks in interpreters of their own."""
    monkeypatch.setattr(multiproc, "_start_interpreter", start_interpreter)
    prompts = [prompt for _, prompt in random_prompts(9, 4, 30)]
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=10, ignore_eos=True, repetition_penalty=1.1)
    two, _ = generate(settings_for(tiny, **TWO), prompts, params)
    one, _ = generate(settings_for(tiny, tensor_parallel_size=1), prompts, params)
    assert two == one


def test_one_rank_in_a_process_of_its_own(tiny: TinyModel) -> None:
    outputs, _ = generate(settings_for(tiny, executor="multiproc", tensor_parallel_size=1), [[1, 2, 3]], GREEDY)
    check_greedy(outputs, tiny, [[1, 2, 3]], 12)


def test_smollm2_on_three_ranks() -> None:
    """Nine heads, three of keys and values, and a quantised file of which each rank reads its part."""
    settings = {"model": "smollm2-135m", "device": "cpu", "memory_bytes": "256mb"}
    params = SamplingParams(temperature=0.0, max_tokens=8)
    texts = []
    for size in (1, 3):
        with LLM(**settings, tensor_parallel_size=size) as llm:
            outputs = llm.generate(TEXTS, params, use_tqdm=False)
            texts.append([output.outputs[0].text for output in outputs])
    assert texts[0] == texts[1] and texts[1][0].startswith(" Paris.")
    refusal = "num_attention_heads=9, num_key_value_heads=3; possible are 1, 3$"
    with pytest.raises(ValueError, match=rf"tensor_parallel_size=2: .* do not divide {refusal}"):
        LLM(**settings, tensor_parallel_size=2)


def test_any_part_of_a_quantised_tensor_is_that_of_the_whole() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for named in GGUFCheckpoint(resolve_model("smollm2-135m").path).tensors():
        if len(named.shape) == 2 and named.name.startswith("model.layers.7."):
            whole = named.tensor
            first, last = sorted(rng.sample(range(1, named.shape[1]), 2))  # anywhere in a quantised block
            assert torch.equal(named.read(Shard(1, first, last, named.shape[1])), whole[:, first:last]), named.name
            heads = named.shape[0] // 64  # rows of query and key are parts of heads
            first, last = sorted(rng.sample(range(heads + 1), 2))
            part = Shard(0, first * 64, last * 64, named.shape[0])
            assert torch.equal(named.read(part), whole[first * 64 : last * 64]), named.name


@pytest.mark.usefixtures("short_silence")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("how", "message"), [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "hangs: no sign of life")]
)
def test_a_rank_that_dies_or_hangs_is_named(tiny: TinyModel, rank: int, how: signal.Signals, message: str) -> None:
    executor = make_executor(tiny, **TWO)
    pids = pids_of(executor)
    timer = threading.Timer(0.5, os.kill, (pids[rank], how))
    timer.start()
    began_s = time.monotonic()
    with pytest.raises(RankError, match=rf"rank {rank} of 2 \(process {pids[rank]}\) {message}"):
        step_until_it_fails(executor)
    assert time.monotonic() - began_s < 60
    assert not any(map(is_alive, pids))
    with pytest.raises(RankError, match=f"wait cannot be run, the ranks have ended: rank {rank} of 2"):
        executor.wait()
    with pytest.raises(RankError, match=f"launch cannot be run, the ranks have ended: rank {rank} of 2"):
        executor.launch(SchedulerOutput(0))
    assert executor.memory_stats().mapped_bytes == 0
    executor.shutdown()


def test_a_rank_that_dies_without_work_is_named(tiny: TinyModel) -> None:
    executor = make_executor(tiny, **TWO)
    pids = pids_of(executor)
    executor.check_health()
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RankError, match=rf"rank 1 of 2 \(process {pids[1]}\) was ended by SIGKILL"):
        wait_until(lambda: executor.check_health() is not None, "it is not noticed")
    assert not any(map(is_alive, pids))
    with pytest.raises(RankError, match="rank 1 of 2"):
        executor.check_health()


def test_functions_of_this_process_are_refused_and_other_requests_go_on(tiny: TinyModel) -> None:
    with LLM(**settings_for(tiny, **TWO)) as llm:
        llm.engine.add_request("b", [1, 2], replace(GREEDY, max_tokens=1))
        params = replace(GREEDY, logits_processors=[lambda output, logits: logits])
        with pytest.raises(ValueError, match="logits_processors must be empty with tensor_parallel_size > 1"):
            llm.engine.add_request("a", [1, 2], params)
        outputs = []
        while llm.engine.has_work:
            outputs += llm.engine.step()
    assert [output.request_id for output in outputs] == ["b"]
    assert outputs[0].outputs[0].token_ids == [int(tiny.logprobs([1, 2])[-1].argmax())]


def test_a_kill_from_another_thread_ends_a_command_that_waits(tiny: TinyModel) -> None:
    executor = make_executor(tiny, tensor_parallel_size=2)
    pids = pids_of(executor)
    check_that_a_kill_ends_waiting_commands(executor, pids[1])
    assert not any(map(is_alive, pids))


def test_a_shutdown_leaves_no_process(tiny: TinyModel) -> None:
    executor = make_executor(tiny, **TWO)
    pids = pids_of(executor)
    executor.shutdown()
    executor.shutdown()
    assert not any(map(is_alive, pids))


def test_an_executor_that_is_dropped_leaves_no_process(tiny: TinyModel) -> None:
    executor = make_executor(tiny, **TWO)
    pids = pids_of(executor)
    del executor
    assert not any(map(is_alive, pids))


_KILLED = """
import os, signal, sys, time
from sarathi.config.load import make_config
from sarathi.executor.ranks.multiproc import MultiprocExecutor
executor = MultiprocExecutor(make_config(**{settings!r}))
pids = [each.process.pid for each in executor._ranks._transport.processes]
print(*pids, flush=True)
os.kill(pids[1], signal.SIGSTOP)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ranks_end_with_an_executor_that_is_killed_also_one_that_is_stopped(tiny: TinyModel) -> None:
    program = _KILLED.format(settings=settings_for(tiny, **TWO))
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=300, check=False)
    pids = list(map(int, done.stdout.split()))
    assert done.returncode == -signal.SIGKILL and len(pids) == 2
    wait_until(lambda: not any(map(is_alive, pids)), "ranks are left")


@pytest.fixture
def no_process_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(multiproc, "_RankProcess", refuse)
    yield


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": "uniproc"}, "tensor_parallel_size=2 .* the in-process executor has one rank"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_what_no_rank_is_needed_for_is_refused_at_once(
    tiny: TinyModel, settings: dict, message: str, no_process_starts: None
) -> None:
    with pytest.raises(ValueError, match=message):
        make_executor(tiny, **{**TWO, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tensor_parallel_size": 4},
            r"tensor_parallel_size=4: .* do not divide num_attention_heads=6; possible are 1, 2$",
        ),
        (
            {"tensor_parallel_size": 3},
            r"do not divide intermediate_size=80, num_key_value_heads=2; possible are 1, 2$",
        ),
        ({"max_model_len": 257}, "max_model_len=257: the model has positions for at most 256"),
        ({"memory_bytes": 1000}, "memory_bytes=1000"),
    ],
)
def test_settings_that_cannot_work_are_the_ranks_own_errors(tiny: TinyModel, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_executor(tiny, **{**TWO, **settings})
