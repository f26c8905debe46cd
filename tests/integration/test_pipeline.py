"""Pipelines over processes, on the CPU: outputs, steps in flight, shortage on one rank, failures."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from process_tree import is_alive
from rank_helpers import (
    BACKENDS,
    FAMILIES,
    GREEDY,
    TEXTS,
    check_family,
    check_greedy,
    generate,
    make_executor,
    pids_of,
    settings_for,
    step_until_it_fails,
)
from short_rank import SHORT_STEPS
from tiny_models import TinyModel, random_prompts

from sarathi import LLM, SamplingParams
from sarathi.config.schema import SCHEDULERS
from sarathi.executor.ranks import multiproc
from sarathi.executor.ranks.group import RankError

pytestmark = pytest.mark.usefixtures("forked_ranks")
GRIDS = [
    {"pipeline_parallel_size": 2, "tensor_parallel_size": 1}, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2},
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("number", "name"), list(enumerate([*FAMILIES, "smollm2", "llama-with-biases"])))
def test_stages_compute_what_transformers_computes(number: int, name: str, grid: dict, tmp_path: Path) -> None:
    """Two stages of three layers, so that tokens have two sizes in one region of all layers. The ranks are compared."""
    backend = BACKENDS[(number + grid["tensor_parallel_size"]) % 3]
    changes = FAMILIES.get(name, {})
    check_family(name, changes, tmp_path, attention_backend=backend, check_ranks_every=1, **grid)


@pytest.mark.parametrize("policy", SCHEDULERS)
def test_preemption_and_any_policy_change_nothing(tiny: TinyModel, policy: str) -> None:
    backend = BACKENDS[SCHEDULERS.index(policy) % 3]
    prompts = [[prompt[0]] * 110 + prompt for _, prompt in random_prompts(7, 6, 16)]  # a page holds 128 tokens
    pages = 17 if "paged" in backend else 20  # room for two prompts, and not for their outputs
    settings = settings_for(
        tiny, attention_backend=backend, memory_bytes=pages * 4096, chunk_size=100, scheduler_type=policy,
        check_ranks_every=3, **GRIDS[0],
    )  # fmt: skip
    outputs, preemptions = generate(settings, prompts, replace(GREEDY, max_tokens=25))
    check_greedy(outputs, tiny, prompts, 25)
    assert preemptions or policy in ("orca", "faster_transformer")


def test_as_many_steps_are_in_flight_as_there_are_stages(tiny: TinyModel) -> None:
    with LLM(**settings_for(tiny, pipeline_parallel_size=3)) as llm:
        core = llm.engine.core
        launch, depths = core.executor.launch, []  # type: ignore[attr-defined]

        def counted(out):
            depths.append((len(core._steps), len(out.chunks)))  # type: ignore[attr-defined]
            return launch(out)

        core.executor.launch = counted  # type: ignore[attr-defined]
        llm.generate([[3 + each] * 5 for each in range(6)], replace(GREEDY, max_tokens=40), use_tqdm=False)
        assert core.executor.max_in_flight == 3  # type: ignore[attr-defined]
        busy_s = core.executor.busy_s()  # type: ignore[attr-defined]
    in_the_middle = depths[20:80]
    assert [depth for depth, _ in in_the_middle] == [2] * 60
    assert [count for _, count in in_the_middle] == [2] * 60  # six decodes, a third in each step
    assert len(busy_s) == 3 and min(busy_s) > 0


@pytest.mark.parametrize("grid", GRIDS)
def test_shortage_on_one_rank_alone_fails_the_step_on_all(
    tiny: TinyModel, grid: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        multiproc, "_PROGRAM", multiproc._PROGRAM.replace("sarathi.executor.ranks.process", "short_rank")
    )
    prompts = [prompt for _, prompt in random_prompts(8, 8, 40)]
    outputs, _ = generate(settings_for(tiny, chunk_size=64, **grid), prompts, GREEDY)
    assert caplog.text.count("memory ran out in step") == len(SHORT_STEPS)
    check_greedy(outputs, tiny, prompts, 12)


def test_the_weights_of_every_rank_go_and_come(tiny: TinyModel) -> None:
    with LLM(**settings_for(tiny, mapped_weights=True, **GRIDS[1])) as llm:
        for _ in range(2):
            llm.sleep(level=2)
            llm.wake_up()
            [output] = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
            check_greedy([list(output.outputs[0].token_ids)], tiny, [[1, 2, 3]], 12)


def test_drawn_tokens_and_logprobs_are_those_of_one_rank(tiny: TinyModel) -> None:
    prompts = [prompt for _, prompt in random_prompts(9, 4, 30)]
    params = SamplingParams(
        temperature=0.8, top_p=0.9, seed=5, max_tokens=10, ignore_eos=True, repetition_penalty=1.1,
        bad_words=[(7,), (8, 9)], prompt_logprobs=1,
    )  # fmt: skip
    several, _ = generate(settings_for(tiny, **GRIDS[1]), prompts, params)
    one, _ = generate(settings_for(tiny), prompts, params)
    assert several == one


@pytest.mark.parametrize("sizes", [(1, 2), pytest.param((3, 2), marks=pytest.mark.slow)])
def test_smollm2_over_stages(sizes: tuple[int, int]) -> None:
    """Each rank reads its layers of a quantised file, and its heads of them."""
    settings = {"model": "smollm2-135m", "device": "cpu", "memory_bytes": "256mb"}
    params = SamplingParams(temperature=0.0, max_tokens=8)
    texts = []
    for tensor, pipeline in ((1, 1), sizes):
        with LLM(**settings, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline) as llm:
            texts.append([output.outputs[0].text for output in llm.generate(TEXTS, params, use_tqdm=False)])
    assert texts[0] == texts[1] and texts[1][0].startswith(" Paris.")


@pytest.mark.slow
@pytest.mark.usefixtures("short_silence")
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize(
    ("how", "message"), [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "hangs: no sign of life")]
)
def test_a_rank_that_dies_or_hangs_is_named(tiny: TinyModel, rank: int, how: signal.Signals, message: str) -> None:
    executor = make_executor(tiny, **GRIDS[1])
    pids = pids_of(executor)
    timer = threading.Timer(0.5, os.kill, (pids[rank], how))
    timer.start()
    began_s = time.monotonic()
    with pytest.raises(RankError, match=rf"rank {rank} of 4 \(process {pids[rank]}\) {message}"):
        step_until_it_fails(executor)
    assert time.monotonic() - began_s < 60
    assert not any(map(is_alive, pids))
    executor.shutdown()


def test_a_rank_that_holds_another_token_is_found(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        multiproc, "_PROGRAM", multiproc._PROGRAM.replace("sarathi.executor.ranks.process", "differing_rank")
    )
    executor = make_executor(tiny, check_ranks_every=2, **GRIDS[1])
    with pytest.raises(RankError, match=r"launch 6: ranks \[2\] hold other requests, tokens or lengths than rank 0"):
        step_until_it_fails(executor)
    executor.shutdown()


def test_more_stages_than_layers_are_refused(tiny: TinyModel) -> None:
    with pytest.raises(ValueError, match="pipeline_parallel_size=4: the model has 3 layers"):
        make_executor(tiny, pipeline_parallel_size=4)
