"""What tests of several ranks share: settings, executors, outputs against transformers, processes."""

import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from random_driver import RandomDriver
from tiny_models import EVERYTHING, TinyModel, build, largest_difference, random_prompts

from sarathi import LLM, SamplingParams
from sarathi.config.load import make_config
from sarathi.executor.factory import create_executor
from sarathi.executor.ranks.executor import RanksExecutor
from sarathi.executor.ranks.group import RankError
from sarathi.messages import Chunk, NewRequest, SchedulerOutput

BACKENDS = ("sdpa_paged_4", "sdpa_vattn_4kb", "sdpa_vattn_megacache_sync_4kb")
# Two KV heads on two ranks; yi has one, which both ranks hold.
FAMILIES = {"llama2": {}, "mistral": {}, "qwen2": {}, "qwen3": {"num_key_value_heads": 2}}
TEXTS = ["The capital of France is", "Water boils at", "def fibonacci(n):\n", "There was once a fox. " * 40]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def settings_for(tiny: TinyModel, **settings: object) -> dict:
    defaults = {
        "model": str(tiny.folder), "device": "cpu", "attention_backend": "sdpa_vattn_4kb", "memory_bytes": 2**21,
        "max_num_seqs": 8,
    }  # fmt: skip
    return {**defaults, **settings}


def make_executor(tiny: TinyModel, **settings: object) -> RanksExecutor:
    executor = create_executor(make_config(**settings_for(tiny, **settings)))
    assert isinstance(executor, RanksExecutor)
    return executor


def check_family(name: str, changes: dict, folder: Path, **settings: object) -> None:
    """Random batches of a tiny model of the family, against transformers' log probabilities of every token."""
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    model = build(name, folder, **changes)
    executor = make_executor(model, **settings)
    prompts = dict(random_prompts(seed, 6, 40))
    tokens = RandomDriver(executor, seed).run(prompts, EVERYTHING, 5)
    executor.shutdown()
    assert max(largest_difference(model, prompt, tokens[name]) for name, prompt in prompts.items()) < 1e-4


def generate(settings: dict, prompts: list[list[int]], params: SamplingParams) -> tuple[list[list[int]], int]:
    """Outputs, and how many requests were preempted."""
    with LLM(**settings) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        llm.engine.core.executor.check_integrity()  # type: ignore[attr-defined]
        preemptions = llm.engine.core.scheduler.num_preemptions  # type: ignore[attr-defined]
        assert llm.memory_stats().mapped_bytes == llm.memory_stats().idle_bytes
    return [list(output.outputs[0].token_ids) for output in outputs], preemptions


def check_greedy(outputs: list[list[int]], tiny: TinyModel, prompts: list[list[int]], count: int) -> None:
    """Each of `count` tokens is transformers' most likely one after those before it, or as likely but for rounding: of
    50,000 tokens one has another that is within 1e-5."""
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == count
        logprobs = tiny.logprobs([*prompt, *output])[len(prompt) - 1 : -1]
        chosen = logprobs.gather(1, torch.tensor(output)[:, None])[:, 0]
        lost = logprobs.max(dim=1).values - chosen
        assert lost.max() < 1e-4, f"prompt {prompt}, output {output}, less likely by {lost.tolist()}"


def pids_of(executor: RanksExecutor) -> list[int]:
    """Process ids of the ranks of a MultiprocExecutor."""
    return [each.process.pid for each in executor._ranks._transport.processes]  # type: ignore[attr-defined]


def step_until_it_fails(executor: RanksExecutor) -> None:
    for step_id in range(10**6):
        new = NewRequest(str(step_id), (3,) * 64, GREEDY)
        executor.execute(SchedulerOutput(step_id, (new,), (Chunk(str(step_id), 0, 64, True, 64),)))
        executor.execute(SchedulerOutput(step_id, finished=(str(step_id),)))


def check_that_a_kill_ends_waiting_commands(executor: RanksExecutor, stopped: int) -> None:
    """stopped: the process of a rank, which will not answer. The command waits in another thread than the kill."""
    os.kill(stopped, signal.SIGSTOP)
    transport = executor._ranks._transport
    is_waiting = threading.Event()

    def receive(timeout_s: float) -> list:
        is_waiting.set()
        return type(transport).receive(transport, timeout_s)

    transport.receive = receive  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        command = pool.submit(executor.memory_stats)
        assert is_waiting.wait(60)
        executor.kill("the other engine has ended")
        with pytest.raises(RankError, match=r"^the other engine has ended$"):
            command.result(60)
    with pytest.raises(RankError, match="the ranks have ended: the other engine has ended"):
        executor.execute(SchedulerOutput(0))
    executor.shutdown()
