"""Each row of the table in docs/schedulers.md, shown on a simulated clock: a step takes 1 ms and 10 us a token."""

from __future__ import annotations

import random

import pytest
from scheduler_simulation import Timeline, make_pair, make_request, run_to_end, simulate, step

from sarathi.config.schema import SCHEDULERS, ChunkBudgetConfig, SchedulerConfig
from sarathi.core.scheduler.prefill_policy import LatencyPrefill
from sarathi.messages import CacheCapacity

WIDE = CacheCapacity(100_000, 1, 16)


def mixed(policy: str, num_prompt: int, **knobs) -> tuple[Timeline, list[str]]:
    """Four requests decode; half a simulated second later a prompt of num_prompt tokens comes."""
    config = SchedulerConfig(type=policy, chunk_size=256, **knobs)
    scheduler, worker = make_pair(config, "sdpa_vattn", WIDE, 40_000)
    decoding = [(0.0, make_request(f"d{i}", 16, 600, ignore_eos=True)) for i in range(4)]
    line = simulate(scheduler, worker, [*decoding, (0.5, make_request("prompt", num_prompt, 5, ignore_eos=True))])
    return line, [request.request_id for _, request in decoding]


def longest_gap_s(policy: str, num_prompt: int) -> float:
    line, decoding = mixed(policy, num_prompt)
    return max(max(line.gaps_s(name)) for name in decoding)


# Time between tokens.


def test_sarathi_never_skips_a_running_decode() -> None:
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    scheduler, worker = make_pair(SchedulerConfig(chunk_size=32, max_num_seqs=64), "sdpa_vattn", WIDE, 1000)
    for i in range(120):
        scheduler.add(make_request(f"r{i}", rng.randint(1, 200), rng.randint(1, 60), ignore_eos=True))
    while scheduler.has_work:
        due = {state.request.request_id for state in scheduler._running.split()[0]}
        out = step(scheduler, worker)
        assert due <= {chunk.request_id for chunk in out.chunks}
        assert out.num_tokens <= 32
        if due:
            assert out.chunks[0].request_id in due, "decodes come first in the batch"


def test_the_gap_beside_a_prompt_is_bounded_by_sarathi_and_grows_with_the_prompt_in_vllm_and_orca() -> None:
    budget_s = 1e-3 + 256 * 1e-5
    for num_prompt in (1000, 4000, 16000):
        assert longest_gap_s("sarathi", num_prompt) <= budget_s * 1.001
        assert longest_gap_s("vllm", num_prompt) > num_prompt * 1e-5
        assert longest_gap_s("orca", num_prompt) > num_prompt * 1e-5
    assert longest_gap_s("vllm", 16000) > 3.5 * longest_gap_s("vllm", 4000)


def test_simple_chunking_puts_one_chunk_between_two_decodes_and_no_more() -> None:
    step_of_chunk_s, step_of_decodes_s = 1e-3 + 256e-5, 1e-3 + 4e-5
    for num_prompt in (1000, 16000):
        gap_s = longest_gap_s("simple_chunking", num_prompt)
        assert gap_s == pytest.approx(step_of_chunk_s + step_of_decodes_s)


def test_faster_transformer_never_interrupts_a_batch() -> None:
    line, decoding = mixed("faster_transformer", 16000)
    gaps_s = [gap for name in decoding for gap in line.gaps_s(name)]
    assert max(gaps_s) == pytest.approx(min(gaps_s)) == pytest.approx(1e-3 + 4e-5)
    assert line.token_times_s["prompt"][0] > max(line.token_times_s[name][-1] for name in decoding)


# Time to first token.


def test_who_answers_a_late_prompt_first() -> None:
    first = {}
    for policy in SCHEDULERS:
        line, _ = mixed(policy, 8000)
        first[policy] = line.token_times_s["prompt"][0]
    assert first["vllm"] <= first["orca"] < first["sarathi"] < first["simple_chunking"] < first["faster_transformer"]


def test_vllm_starts_waiting_prompts_before_it_decodes() -> None:
    scheduler, worker = make_pair(SchedulerConfig(type="vllm"), "sdpa_vattn", WIDE, 1000)
    for i in range(6):
        scheduler.add(make_request(f"r{i}", 400, 9, ignore_eos=True))
    batches = [[chunk.num_tokens for chunk in step(scheduler, worker).chunks] for _ in range(4)]
    assert batches == [[400, 400], [400, 400], [400, 400], [1] * 6]


# Memory.


def test_orca_and_faster_transformer_admit_no_more_than_their_reservation() -> None:
    for policy in ("orca", "faster_transformer"):
        capacity = CacheCapacity(64, 1, 16)
        scheduler, worker = make_pair(SchedulerConfig(type=policy), "sdpa_paged_16", capacity, 300)
        for i in range(10):
            scheduler.add(make_request(f"r{i}", 10, 10, ignore_eos=True))
        peak = 0
        while scheduler.has_work:
            out = step(scheduler, worker)
            peak = max(peak, scheduler.num_running)
            assert all(chunk.granted_tokens == 19 * 16 for chunk in out.chunks)
        assert peak == 64 // -(-300 // 16) == 3 and scheduler.num_preemptions == 0


def test_sarathi_and_vllm_run_what_fits_now_and_preempt_when_it_grows() -> None:
    for policy in ("sarathi", "vllm", "simple_chunking"):
        scheduler, worker = make_pair(SchedulerConfig(type=policy), "sdpa_paged_16", CacheCapacity(64, 1, 16), 300)
        arrivals = [(0.0, make_request(f"r{i}", 60, 230, ignore_eos=True)) for i in range(12)]
        line = simulate(scheduler, worker, arrivals)
        assert line.peak_running >= 10 and scheduler.num_preemptions > 0


def test_orca_lets_requests_join_and_leave_at_every_step_and_faster_transformer_does_not() -> None:
    waits = {}
    for policy in ("orca", "faster_transformer"):
        config = SchedulerConfig(type=policy, max_num_seqs=2)
        scheduler, worker = make_pair(config, "sdpa_vattn", WIDE, 300)
        for name, length in (("long", 100), ("short", 5), ("next", 5)):
            scheduler.add(make_request(name, 10, length, ignore_eos=True))
        outputs = run_to_end(scheduler, worker)
        waits[policy] = next(i for i, out in enumerate(outputs) if out.chunks[-1].request_id == "next")
    assert waits == {"orca": 5, "faster_transformer": 100}


# Long prompts beside short ones.


def first_token_of_short_s(**knobs) -> float:
    scheduler, worker = make_pair(SchedulerConfig(chunk_size=512, **knobs), "sdpa_vattn", WIDE, 140_000)
    arrivals = [(0.0, make_request("huge", 130_000, 1)), (0.1, make_request("short", 300, 1))]
    line = simulate(scheduler, worker, arrivals)
    return line.token_times_s["short"][0] - 0.1


def test_a_huge_prompt_does_not_block_short_ones_where_one_request_is_capped() -> None:
    assert first_token_of_short_s() > 1.0
    assert first_token_of_short_s(max_chunk_per_request=384) < 0.05
    assert first_token_of_short_s(max_chunk_per_request=384, max_num_partial_prefills=1) > 1.0


def test_several_prompts_are_in_progress_at_once_up_to_the_limit() -> None:
    for limit in (1, 2, 3, 5):
        config = SchedulerConfig(chunk_size=64, max_chunk_per_request=8, max_num_partial_prefills=limit)
        scheduler, worker = make_pair(config, "sdpa_vattn", WIDE, 1000)
        for i in range(7):
            scheduler.add(make_request(f"r{i}", 100, 1))
        counts = [len(step(scheduler, worker).chunks) for _ in range(10)]
        assert set(counts) == {limit}


# Budgets that change.


def test_a_scheduled_budget_shrinks_as_the_prompt_grows() -> None:
    knobs = ChunkBudgetConfig(
        policy="schedule",
        low_chunk_size=10,
        high_chunk_size=100,
        chunk_schedule_max_tokens=400,
        chunk_schedule_stages=4,
    )
    scheduler, worker = make_pair(SchedulerConfig(chunk_budget=knobs), "sdpa_vattn", WIDE, 1000)
    scheduler.add(make_request("r", 500, 1))
    lengths = [out.num_tokens for out in run_to_end(scheduler, worker)]
    assert lengths == [100, 70, 70, 40, 40, *[10] * 18, 0]


@pytest.mark.parametrize("target_s", [0.003, 0.006, 0.012])
def test_a_learned_budget_meets_its_target(target_s: float) -> None:
    """The scheduler is told nothing of the law; its steps settle below the target, and not far below."""
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    knobs = ChunkBudgetConfig(policy="latency", low_chunk_size=16, high_chunk_size=4096, target_step_s=target_s)
    scheduler, worker = make_pair(SchedulerConfig(chunk_budget=knobs), "sdpa_vattn", WIDE, 100_000)
    arrivals = [(0.0, make_request(f"d{i}", 16, 400, ignore_eos=True)) for i in range(4)]
    arrivals += [(0.0, make_request(f"p{i}", 30_000, 1)) for i in range(20)]
    line = simulate(scheduler, worker, arrivals, lambda n: (1e-3 + 1e-5 * n) * rng.uniform(0.95, 1.05))
    settled_s = line.gaps_s("d0")[100:]
    assert sum(settled_s) / len(settled_s) == pytest.approx(target_s, rel=0.12)
    assert max(settled_s) < 1.15 * target_s


def test_a_learned_budget_gives_way_at_once_when_steps_become_slower() -> None:
    knobs = ChunkBudgetConfig(policy="latency", low_chunk_size=16, high_chunk_size=4096, target_step_s=0.02)
    policy = LatencyPrefill(SchedulerConfig(chunk_budget=knobs))
    token_s = 1e-5
    for _ in range(60):
        tokens = policy.budget(0)
        policy.observe(tokens, 1e-3 + token_s * tokens)
    assert policy.budget(0) == pytest.approx(1900, rel=0.01)
    token_s *= 4
    for _ in range(2):
        tokens = policy.budget(0)
        policy.observe(tokens, 1e-3 + token_s * tokens)
    assert 1e-3 + token_s * policy.budget(0) < 1.05 * 0.02
    idle = policy.budget(0)
    policy.observe(idle // 3, 1e-3)
    assert policy.budget(0) == idle, "a step that was not full says nothing about larger ones"


def test_a_target_that_cannot_be_met_still_makes_progress() -> None:
    knobs = ChunkBudgetConfig(policy="latency", low_chunk_size=1, high_chunk_size=64, target_step_s=1e-5)
    scheduler, worker = make_pair(SchedulerConfig(chunk_budget=knobs), "sdpa_vattn", WIDE, 1000)
    arrivals = [(0.0, make_request(f"r{i}", 20, 50, ignore_eos=True)) for i in range(12)]
    line = simulate(scheduler, worker, arrivals)
    assert all(len(times) == 50 for times in line.token_times_s.values())
    assert line.peak_running == 12, "a budget of one token keeps others from starting"
