"""Prefix caching changes no output: trees of prompts, with preemption, aborts, eviction and shrinking budgets."""

import random
import time
from dataclasses import replace

import pytest
import torch
from http_server import options, running_server
from small_models import save_tiny_model
from tiny_models import compute_in_float64

from sarathi import LLM, SamplingParams
from sarathi.messages import NewRequest, PrefixCacheStats
from sarathi.worker.cache_engine.vattn import vATTNCacheEngine

CLOSE = 1e-6  # of logprobs in float64; other keys and values move them by more than 1e-5
VATTN = ["sdpa_vattn_4kb", "sdpa_vattn_megacache_4kb", "sdpa_vattn_sync_4kb"]
POSITIONS = {"max_position_embeddings": 320}
SETTINGS = {
    "device": "cpu", "dtype": "float32", "max_model_len": 320, "max_num_seqs": 6, "chunk_size": 40,
}  # fmt: skip


def _prompts(rng):
    """Prompts that branch off earlier ones at random places, and repeats of whole prompts."""
    prompts = [[rng.randrange(3, 60) for _ in range(rng.randint(150, 250))]]
    for _ in range(30):
        parent = rng.choice(prompts)
        own = [rng.randrange(3, 60) for _ in range(rng.choice((0, 3, 60)))]
        prompts.append([*parent[: rng.randint(len(parent) // 3, len(parent))], *own][:280])
    return prompts


class _Canary:
    """Hashes, after every step, the rows that a slot shares with others: nobody may change them."""

    def __init__(self, cache):
        self._cache = cache if isinstance(cache, vATTNCacheEngine) else None
        self._seen = {}
        self.num_checked = 0

    def check(self):
        if self._cache is None:
            return
        now = {}
        for slot in self._cache._slots.values():
            if slot.num_shared:
                parts = [tensor[slot.number, : slot.num_shared] for tensor in self._cache._cache.tensors()]
                now[id(slot)] = slot, slot.num_shared, tuple(hash(part.numpy().tobytes()) for part in parts)
        for key, (slot, length, hashes) in now.items():
            if key in self._seen and self._seen[key][:2] == (slot, length):
                assert self._seen[key][2] == hashes, f"shared tokens of slot {slot} were written"
                self.num_checked += 1
        self._seen = now


def _drive(engine, rng, prompts, params, expected, canary, shrinks):
    """Requests at random times, some of them aborted on their way; all others must bring what is expected."""
    core, asked = engine.core, {}
    tokens = {}
    todo = [rng.randrange(len(prompts)) for _ in range(40)]
    while todo or core.has_work:
        if todo and rng.random() < 0.7:
            name, which = f"r{len(asked)}", todo.pop()
            asked[name], tokens[name] = which, []
            core.add_requests([NewRequest(name, tuple(prompts[which]), params[which])])
        if asked and rng.random() < 0.1:
            gone = rng.choice(list(asked))
            core.finish(gone, "abort")
            tokens.pop(gone, None)
        if shrinks and rng.random() < 0.1:
            longest = core.facts.capacity.rows_for(320)
            core.resize(rng.randint(longest, rng.choice((3, 4)) * longest // 2))
        for update in core.step().updates:
            if update.request_id in tokens:
                assert update.finish_reason != "error"
                tokens[update.request_id] += [(token.token_id, token.logprob) for token in update.tokens]
        core.scheduler.check_integrity()
        core.executor.check_integrity()
        canary.check()
    for name, got in tokens.items():
        ids, logprobs = zip(*got, strict=True)
        expected_ids, expected_logprobs = expected[asked[name]]
        assert list(ids) == expected_ids, (name, asked[name])
        assert logprobs == pytest.approx(expected_logprobs, abs=CLOSE), (name, asked[name])


PAIRS = [
    pytest.param(backend, policy, marks=pytest.mark.slow if (row + column) % 2 else ())
    for row, backend in enumerate([*VATTN, "sdpa_paged_16", "sdpa_paged_4"])
    for column, policy in enumerate(["lru", "lfu"])
]  # half of them in `make test`
LEAST = {
    "num_hit_tokens": 500, "num_evicted_rows": 5, "num_mapped_tokens": 100, "num_copied_tokens": 30, "preemptions": 1
}  # fmt: skip


def logprobs_of(completion):
    """Of its tokens: tiny models write the same tokens for many a beginning, but not as likely ones."""
    return [top[token].logprob for token, top in zip(completion.token_ids, completion.logprobs, strict=True)]


def copy_at_once(targets, sources):
    """As a GPU may do it: every source is read before any target is written."""
    for target, values in zip(targets, [source.clone() for source in sources], strict=True):
        target.copy_(values)


@pytest.mark.parametrize(("backend", "policy"), PAIRS)
def test_outputs_are_equal_with_and_without(tmp_path, backend, policy, monkeypatch):
    compute_in_float64(monkeypatch)
    monkeypatch.setattr(torch, "_foreach_copy_", copy_at_once)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    folder = save_tiny_model(tmp_path, **POSITIONS)
    prompts = _prompts(rng)
    params = [
        SamplingParams(temperature=0, max_tokens=rng.randint(1, 30), ignore_eos=True, logprobs=1) for _ in prompts
    ]
    with LLM(folder, **SETTINGS, attention_backend=backend, memory_bytes="4mb", prefix_caching=False) as llm:
        outputs = [llm.generate([prompt], param)[0] for prompt, param in zip(prompts, params, strict=True)]
        expected = [(output.outputs[0].token_ids, logprobs_of(output.outputs[0])) for output in outputs]
    settings = {"memory_bytes": "4mb", "prefix_caching": True, "prefix_eviction": policy}
    with LLM(folder, **SETTINGS, attention_backend=backend, **settings) as llm:
        scheduler = llm.engine.core.scheduler
        canary = _Canary(llm.engine.core.executor._worker._cache)
        llm.engine.core.resize(4 * llm.engine.core.facts.capacity.rows_for(320))
        for shrinks in (False, True) * 6:  # until everything has happened
            _drive(llm.engine, rng, prompts, params, expected, canary, shrinks)
            counts = scheduler.prefix_cache_stats._asdict() | {"preemptions": scheduler.num_preemptions}
            few = {name: counts[name] for name, least in LEAST.items() if counts[name] < least}
            if shrinks and not few:
                break
    assert not few and (canary.num_checked > 20 or "vattn" not in backend)


@pytest.mark.parametrize("backend", [*VATTN, "sdpa_paged_16"])
def test_two_that_start_in_one_step_have_the_tokens_of_the_first(tmp_path, backend, monkeypatch):
    """The second of them has the first one as its source, which has its own copy in the same step."""
    compute_in_float64(monkeypatch)
    monkeypatch.setattr(torch, "_foreach_copy_", copy_at_once)
    document = [random.randrange(3, 60) for _ in range(230)]
    prompts = [[*document, 5, number] for number in range(4)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    settings = {**SETTINGS, "attention_backend": backend, "memory_bytes": "4mb"}
    found = []
    for caching in (False, True):
        with LLM(save_tiny_model(tmp_path, **POSITIONS), **settings, prefix_caching=caching) as llm:
            found += [logprobs_of(output.outputs[0]) for output in llm.generate(prompts, params)]
            assert (llm.engine.core.prefix_cache_stats().num_copied_tokens > 0) == caching
    for without, ours in zip(found[: len(prompts)], found[len(prompts) :], strict=True):
        assert ours == pytest.approx(without, abs=CLOSE)


def test_callers_see_what_was_cached(tmp_path):
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    prompt = [rng.randrange(3, 60) for _ in range(100)]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with LLM(save_tiny_model(tmp_path, **POSITIONS), **SETTINGS, memory_bytes="4mb") as llm:

        def cached(prompt=prompt, **more):
            return llm.generate([prompt], replace(params, **more))[0].num_cached_tokens

        assert [cached(), cached(), cached([*prompt[:50], 61])] == [0, 99, 50]
        assert [cached(cache_salt="a"), cached(cache_salt="b"), cached(cache_salt="a")] == [0, 0, 99]
        assert cached(prompt_logprobs=1) == 0
        assert cached([7] * 100, n=4) == 0
        stats = llm.prefix_cache_stats()
        assert stats.num_hit_tokens >= 99 + 50 + 99 + 3 * 60, "three completions share the prompt of the first"
        memory = llm.memory_stats()
        assert memory.mapped_bytes == memory.idle_bytes > 0 and memory.wasted_bytes == 0 < stats.num_retained_rows
        assert "prefix_caching=True" in repr(llm)
        assert llm.reset_prefix_cache() and llm.prefix_cache_stats().num_retained == 0
        assert [cached(), cached()] == [0, 99]
        llm.engine.core.executor.check_integrity()


@pytest.mark.parametrize("backend", [*VATTN, "sdpa_paged_16"])
def test_retained_memory_is_idle_and_goes_to_whoever_needs_it(tmp_path, backend):
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(save_tiny_model(tmp_path, **POSITIONS), **SETTINGS, memory_bytes="1mb", attention_backend=backend) as llm:
        manager = llm.engine.core.scheduler.block_space_manager
        for _ in range(60):
            llm.generate([[rng.randrange(3, 60) for _ in range(200)]], params, use_tqdm=False)
            stats, memory = llm.prefix_cache_stats(), llm.memory_stats()
            assert manager.num_used_rows == 0 and memory.mapped_bytes == memory.idle_bytes and not memory.wasted_bytes
        assert stats.num_evicted_rows > 0 and 0 < stats.num_retained_rows <= manager.capacity.rows
        assert llm.engine.core.scheduler.num_preemptions == 0


def test_nothing_is_kept_where_it_is_off(tmp_path):
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with LLM(save_tiny_model(tmp_path, **POSITIONS), **SETTINGS, memory_bytes="4mb", prefix_caching=False) as llm:
        found = [llm.generate([[*range(3, 53)]], params, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
        assert found == [0, 0] and llm.prefix_cache_stats() == PrefixCacheStats()
        assert "prefix_caching=False" in repr(llm) and llm.reset_prefix_cache()


def test_clients_of_a_server_set_a_salt_and_see_what_was_cached(tmp_path):
    model = save_tiny_model(tmp_path, max_position_embeddings=512)
    chosen = options(max_model_len=512, max_num_seqs=4)
    with running_server(model, *chosen, env={"SARATHI_ADMIN_KEYS": "admin"}) as server:

        def post(path, headers=None, **body):
            answer = server.post(path, json=body or None, headers=headers)
            return answer.json() if answer.content else answer.status_code

        def cached(**more):
            asked = {"prompt": "What was said in the morning? " * 5, "max_tokens": 3, "ignore_eos": True}
            return post("/v1/completions", model=model, **asked, **more)["usage"]["prompt_tokens_details"]

        say = [{"role": "user", "content": "Whatever is new, and was not said before, is said here. " * 2}]
        assert [cached(), cached()] == [{"cached_tokens": 0}, {"cached_tokens": 149}]
        assert [cached(cache_salt="a")["cached_tokens"] for _ in range(2)] == [0, 149]
        chats = [{"messages": say, "max_tokens": 2, "cache_salt": salt} for salt in ("b", "b", "c")]
        usages = [post("/v1/chat/completions", model=model, **chat)["usage"] for chat in chats]
        found = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        assert found[0] == found[2] == 0 and found[1] == usages[1]["prompt_tokens"] - 1
        asked = [{"input": "Something else, which is long enough.", "cache_salt": salt} for salt in ("d", "d", "e")]
        details = [post("/v1/responses", model=model, max_output_tokens=2, **each)["usage"] for each in asked]
        assert [each["input_tokens_details"]["cached_tokens"] > 30 for each in details] == [False, True, False]
        assert "cache_salt is ''" in post("/v1/completions", model=model, prompt="x", cache_salt="")["error"]["message"]
        assert server.post("/reset_prefix_cache").status_code == 403
        assert post("/reset_prefix_cache", {"Authorization": "Bearer admin"}) == 200
        assert cached() == {"cached_tokens": 0}
        rows = server.get("/stats").json()
        assert rows["used_rows"] == 0 < rows["retained_rows"] <= rows["pooled_rows"] < rows["total_rows"]
        lines = server.get("/metrics").text.splitlines()
        values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("sarathi:prefix")}
        assert values["sarathi:prefix_cache_queries_total"] > values["sarathi:prefix_cache_hits_total"] > 3 * 149
        assert values["sarathi:prefix_cache_retained_rows"] == rows["retained_rows"]
        assert {
            f"sarathi:prefix_cache_{kind}_total" for kind in ("mapped_tokens", "copied_tokens", "evicted_rows")
        } <= {*values}


@pytest.mark.slow
def test_the_second_of_two_long_prompts_has_its_first_token_much_sooner():
    """Processor time of prompts of 1,500 tokens that differ in the last 10."""
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    prompt = [rng.randrange(3, 40_000) for _ in range(1490)]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with LLM("smollm2-135m", load_format="dummy", device="cpu", max_model_len=2048) as llm:
        llm.generate([[5] * 40], params)
        spent_s = []
        for last in (7, 9, 11, 13):
            before_s = time.process_time()
            llm.generate([[*prompt, *[last] * 10]], params)
            spent_s.append(time.process_time() - before_s)
    print(spent_s)
    assert spent_s[0] > 8 * min(spent_s[1:])
