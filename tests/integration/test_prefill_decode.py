"""Prompts computed by one engine and continued by another, behind one LLM: outputs, aborts, failures."""

import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from http_server import wait_until
from process_tree import is_alive
from rank_helpers import BACKENDS, GREEDY, check_greedy, pids_of, settings_for
from short_rank import SHORT_STEPS
from tiny_models import TinyModel, build, random_prompts

from sarathi import LLM, SamplingParams
from sarathi.engine.core import EngineCore
from sarathi.engine.prefill_decode.core import PrefillDecodeCore
from sarathi.executor.ranks import multiproc
from sarathi.executor.ranks.group import RankError
from sarathi.messages import Chunk, MemoryStats

pytestmark = pytest.mark.usefixtures("forked_ranks")
TWO_ENGINES = {"prefill_decode": True, "prefill_chunk_size": 32}


@pytest.fixture(scope="module")
def llm(tiny: TinyModel) -> Iterator[LLM]:
    with LLM(**settings_for(tiny, mapped_weights=True, **TWO_ENGINES)) as llm:
        yield llm


def core_of(llm: LLM) -> PrefillDecodeCore:
    core = llm.engine.core
    assert isinstance(core, PrefillDecodeCore)
    return core


def check_idle(llm: LLM) -> None:
    """No memory of either engine is in use, and all of it is accounted for."""

    def check(core: EngineCore) -> None:
        core.executor.check_integrity()
        core.scheduler.check_integrity()
        assert not core.scheduler.block_space_manager.num_used_rows

    core = core_of(llm)
    wait_until(llm.reset_prefix_cache, "a request has not ended")  # the other engine may hear of an end later
    while llm.engine.has_work:
        llm.engine.step()
    check(core)
    core._prefill_thread.call(check)
    wait_until(lambda: is_unused(core.memory_stats()), "memory is mapped for somebody")


def is_unused(memory: MemoryStats) -> bool:
    return memory.mapped_bytes == memory.idle_bytes


def outputs_of(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(each.outputs[0].token_ids) for each in llm.generate(prompts, params, use_tqdm=False)]


def prompts_of(seed: int) -> list[list[int]]:
    return [prompt for _, prompt in random_prompts(seed, 10, 100)]


def test_what_one_engine_prefills_another_decodes(llm: LLM, tiny: TinyModel) -> None:
    prompts = prompts_of(11)
    check_greedy(outputs_of(llm, prompts), tiny, prompts, 12)
    check_idle(llm)


def test_drawn_tokens_and_logprobs_are_those_of_one_engine(llm: LLM, tiny: TinyModel) -> None:
    prompts = prompts_of(12)
    params = SamplingParams(
        temperature=0.8, top_p=0.9, seed=5, max_tokens=10, ignore_eos=True, repetition_penalty=1.1, min_tokens=4,
        logprobs=2, prompt_logprobs=1,
    )  # fmt: skip
    found = llm.generate(prompts, params, use_tqdm=False)
    with LLM(**settings_for(tiny)) as one:
        expected = one.generate(prompts, params, use_tqdm=False)
    for ours, theirs in zip(found, expected, strict=True):
        assert list(ours.outputs[0].token_ids) == list(theirs.outputs[0].token_ids)
        assert ours.prompt_logprobs is not None and len(ours.prompt_logprobs) == len(theirs.prompt_logprobs or ())


def test_a_first_token_may_be_the_last(llm: LLM, tiny: TinyModel) -> None:
    prompts = prompts_of(13)
    firsts = outputs_of(llm, prompts, replace(GREEDY, max_tokens=1))
    check_greedy(firsts, tiny, prompts, 1)
    stop = replace(GREEDY, stop_token_ids=[each for (each,) in firsts])
    assert outputs_of(llm, prompts, stop) == firsts
    check_idle(llm)


def test_requests_that_are_aborted_at_any_time_leave_nothing_behind(llm: LLM, tiny: TinyModel) -> None:
    prompts, engine = prompts_of(14), llm.engine
    kept = outputs_of(llm, prompts[:2])
    for number in range(40):
        engine.add_request(f"a{number}", prompts[number % 10], GREEDY)
    outputs: dict[str, list[int]] = {}
    for number in range(40):
        if number % 10 > 1:
            for output in engine.step():
                outputs[output.request_id] = list(output.outputs[0].token_ids)
            engine.abort(f"a{number}")
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] = list(output.outputs[0].token_ids)
    assert [outputs[f"a{number}"] for number in (0, 1, 30, 31)] == kept * 2
    check_idle(llm)


def test_samples_share_a_prompt_and_what_is_known_of_one_is_not_sent(llm: LLM, tiny: TinyModel) -> None:
    assert llm.reset_prefix_cache()
    [prompt] = [prompt for _, prompt in random_prompts(17, 1, 1)]
    prompt = [*prompt, *range(3, 83)]
    before = core_of(llm)._prefill_thread.call(lambda core: core.prefix_cache_stats())
    sampled = replace(GREEDY, temperature=0.9, seed=3, n=4)
    [found] = llm.generate([prompt], sampled, use_tqdm=False)
    after = core_of(llm)._prefill_thread.call(lambda core: core.prefix_cache_stats())
    assert after.num_queried_tokens - before.num_queried_tokens == len(prompt)  # of one sample
    with LLM(**settings_for(tiny)) as one:
        [expected] = one.generate([prompt], sampled, use_tqdm=False)
    assert [each.token_ids for each in found.outputs] == [each.token_ids for each in expected.outputs]
    answered = [*prompt, *found.outputs[0].token_ids]
    prompts = [[*answered, 5], [*answered, *range(20, 80)], [*prompt[:50], *range(20, 80)]]
    check_greedy(outputs_of(llm, prompts), tiny, prompts, 12)
    assert core_of(llm).scheduler.prefix_cache_stats.num_hit_tokens > 3 * len(prompt)
    check_idle(llm)


def test_an_interrupt_waits_for_what_is_on_its_way(llm: LLM, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, core = prompts_of(15), core_of(llm)
    start, calls = core._start_prefills, list[Chunk]()

    def interrupted(received: Sequence[Chunk]) -> None:
        start(received)
        calls.extend(received)
        if len(calls) > 1:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(core, "_start_prefills", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    check_greedy(outputs_of(llm, prompts[:2]), tiny, prompts[:2], 12)
    check_idle(llm)


def test_sleep_gives_the_memory_of_both_engines_back(llm: LLM, tiny: TinyModel) -> None:
    for level in (1, 2):  # 2: the weights too
        llm.sleep(level)
        llm.wake_up()
        check_greedy(outputs_of(llm, [[1, 2, 3]]), tiny, [[1, 2, 3]], 12)


def test_what_two_engines_cannot_do_is_refused(llm: LLM, tiny: TinyModel) -> None:
    for settings, message in [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2: it must be 1 with transfer.prefill_decode"),
        ({"executor": "uniproc"}, "executor is 'uniproc': it must be auto, multiproc or ray"),
    ]:
        with pytest.raises(ValueError, match=message):
            LLM(**settings_for(tiny, **TWO_ENGINES, **settings))
    with pytest.raises(ValueError, match="has 256 tokens"):
        llm.generate([[1] * 256], GREEDY, use_tqdm=False)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_ranks_each_send_their_heads_and_preempted_requests_go_on(
    tiny: TinyModel, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [[prompt[0]] * 110 + prompt for _, prompt in random_prompts(7, 6, 16)]  # a page holds 128 tokens
    settings = settings_for(
        tiny, tensor_parallel_size=2, attention_backend=backend, memory_bytes=5 * 6 * 4096, check_ranks_every=3,
        prefill_decode=True,
    )  # fmt: skip
    with LLM(**settings) as llm:
        outputs = outputs_of(llm, prompts, replace(GREEDY, max_tokens=25))
        assert core_of(llm).scheduler.num_preemptions
        check_idle(llm)
    check_greedy(outputs, tiny, prompts, 25)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_of_a_tree_in_little_memory_share_what_they_begin_with(tmp_path: Path, backend: str) -> None:
    tiny, seed = build("llama2", tmp_path), random.randrange(2**31)
    print(f"seed {seed}")
    rng = random.Random(seed)
    trunks = [rng.choices(range(97), k=60) for _ in range(3)]
    prompts = [
        [*rng.choice(trunks)[: rng.randint(20, 60)], *rng.choices(range(97), k=rng.randint(1, 50))] for _ in range(40)
    ]
    settings = settings_for(tiny, attention_backend=backend, memory_bytes=12 * 6 * 4096, **TWO_ENGINES)
    with LLM(**settings) as llm:
        for _ in range(2):
            check_greedy(outputs_of(llm, prompts), tiny, prompts, 12)
        stats = core_of(llm).scheduler.prefix_cache_stats
        check_idle(llm)
    assert stats.num_hit_tokens > 1000 and stats.num_copied_tokens


@pytest.mark.slow
def test_shortage_on_one_rank_alone_fails_the_step_on_all(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        multiproc, "_PROGRAM", multiproc._PROGRAM.replace("sarathi.executor.ranks.process", "short_rank")
    )
    prompts = prompts_of(8)
    settings = settings_for(tiny, tensor_parallel_size=2, prefill_decode=True, prefill_chunk_size=64)
    with LLM(**settings) as llm:
        outputs = outputs_of(llm, prompts)
        check_idle(llm)
    assert caplog.text.count("memory ran out in step") == len(SHORT_STEPS)
    check_greedy(outputs, tiny, prompts, 12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa_vattn_4kb", "sdpa_paged_4"])
def test_prompts_alone_for_which_memory_runs_short_are_computed_where_they_decode(
    tiny: TinyModel, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In their first step, and in a later one when a part of them has been sent."""
    program = multiproc._PROGRAM.replace("sarathi.executor.ranks.process", "short_sender")
    monkeypatch.setattr(multiproc, "_PROGRAM", program)
    prompts = [[number] * 90 + [5, 6] for number in range(1, 4)]
    with LLM(**settings_for(tiny, attention_backend=backend, **TWO_ENGINES)) as llm:
        outputs = [output for prompt in prompts for output in outputs_of(llm, [prompt])]
        check_idle(llm)
    assert caplog.text.count("is computed where it decodes") == caplog.text.count("memory ran out in step") == 3
    check_greedy(outputs, tiny, prompts, 12)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_the_death_of_one_side_ends_both_and_is_told(tiny: TinyModel, side: str) -> None:
    llm = LLM(**settings_for(tiny, **TWO_ENGINES))
    core = core_of(llm)
    sides = {"prefill": pids_of(core._prefill_thread.executor), "decode": pids_of(core.executor)}
    threading.Timer(0.5, os.kill, (sides[side][0], signal.SIGKILL)).start()
    message = rf"{side} rank 0 of 1 \(process {sides[side][0]}\) was ended by SIGKILL"
    with pytest.raises(RankError, match=message):
        while True:
            llm.generate(prompts_of(16), GREEDY, use_tqdm=False)
    assert not any(map(is_alive, sides["prefill"] + sides["decode"]))
    with pytest.raises(RankError, match=message):
        llm.generate([[1, 2]], GREEDY, use_tqdm=False)
    llm.close()
