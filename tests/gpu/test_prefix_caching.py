"""Prefix caching on a GPU: what requests share is the same memory, or the same bytes, and nobody writes it."""

import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("vattention._native", reason="the native module is not built")

from sarathi import LLM, SamplingParams
from sarathi.benchmark.engines.ours import find_model
from sarathi.core.block_space_manager.prefix_caching import groups
from sarathi.messages import NewRequest, PrefixGroup
from sarathi.model_executor.attention.base import KernelUnavailableError

pytestmark = pytest.mark.gpu
BACKENDS = (
    "fa_vattn",
    "fa_vattn_megacache",
    "fa_vattn_megacache_sync",
    "fi_vattn_megacache",
    "fa_paged",
    "fi_paged_16",
)


DOCUMENT = 17_000  # tokens: two units that are mapped together of 16 pages of 512 tokens, or four of 4 pages of 1,024


def open_llm(backend: str, max_model_len: int = 4096, memory_bytes: str = "256mb", *, cascade: bool = False) -> LLM:
    settings = {
        "max_model_len": max_model_len, "max_num_seqs": 16, "chunk_size": 512, "memory_bytes": memory_bytes,
        "cascade_attention": cascade,
    }  # fmt: skip
    model = find_model("two-wide-layers")
    try:
        return LLM(model, load_format="dummy", attention_backend=backend, **settings)
    except KernelUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if "vattn" in name])
def test_a_sharer_has_the_bytes_of_its_source(backend: str) -> None:
    """Three questions to one document at once: the others share what the first has computed and still decodes."""
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    document = [rng.randrange(3, 900) for _ in range(DOCUMENT)]
    params = [SamplingParams(temperature=0, max_tokens=number, ignore_eos=True) for number in (120, 20, 20)]
    with open_llm(backend, 18_432, "1gb") as llm:
        outputs = llm.generate([[*document, 5, number] for number in range(3)], params)
        assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 3
        core = llm.engine.core
        stats = core.prefix_cache_stats()
        print(stats)
        assert stats.num_mapped_tokens >= 2 * 16_384 and stats.num_hit_tokens > 2 * DOCUMENT
        cache = core.executor._worker._cache
        slots = [slot.number for slot in cache._slots.values()]
        assert len(slots) == 3
        torch.cuda.synchronize()
        for tensor in cache._cache.tensors():
            first = tensor[slots[0], : DOCUMENT + 1].clone()
            assert all(tensor[slot, : DOCUMENT + 1].equal(first) for slot in slots[1:])
            assert first.abs().sum() > 0


@pytest.mark.parametrize("backend", ["fa_vattn", "fa_vattn_megacache", "fi_vattn_megacache"])
def test_cascade_attention_gives_the_same_probabilities(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups and a loner, which end at different times; until a token differs, since bfloat16 rounds otherwise."""
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    monkeypatch.setattr(groups, "_LEAST_SAVED", 1)
    found: list[tuple[PrefixGroup, ...]] = []
    find_groups = groups.find_groups
    monkeypatch.setattr(groups, "find_groups", lambda ends: found.append(find_groups(ends)) or found[-1])
    prefixes = [[rng.randrange(3, 900) for _ in range(length)] for length in (3000, 1100, 0)]
    owners = (0, 1, 0, 0, 2, 1, 0, 0)
    prompts = [prefixes[owner] + [rng.randrange(3, 900) for _ in range(rng.randint(5, 200))] for owner in owners]
    params = [
        SamplingParams(temperature=0, max_tokens=rng.randint(10, 50), ignore_eos=True, logprobs=1) for _ in prompts
    ]
    outputs = []
    for cascade in (False, True):
        with open_llm(backend, cascade=cascade) as llm:
            outputs.append([output.outputs[0] for output in llm.generate(prompts, params)])
    assert any(len(groups) == 2 for groups in found) and len(set(found)) > 3
    num_same = 0
    for without, ours in zip(*outputs, strict=True):
        pairs = zip(without.token_ids, ours.token_ids, without.logprobs, ours.logprobs, strict=True)
        for token, own, logprobs, own_logprobs in pairs:
            if token != own:
                break
            assert own_logprobs[own].logprob == pytest.approx(logprobs[token].logprob, abs=0.05)
            num_same += 1
    print(f"{num_same} of {sum(each.max_tokens for each in params)} tokens compared")
    assert num_same > 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_requests_end_with_steps_in_flight_and_evictions(backend: str) -> None:
    """A page that goes while a kernel or a copy uses it would be error 700."""
    rng = random.Random(seed := random.randrange(2**32))
    print(f"seed {seed}")
    documents = [[rng.randrange(3, 900) for _ in range(rng.choice((200, 1500, 3000)))] for _ in range(6)]
    with open_llm(backend) as llm:
        core, waiting = llm.engine.core, 150
        core.resize(core.facts.capacity.rows_for(4096) * 3)
        while waiting or core.has_work:
            if waiting and rng.random() < 0.6:
                waiting -= 1
                prompt = rng.choice(documents)[: rng.randint(1, 3000)] + [rng.randrange(3, 900) for _ in range(9)]
                params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 60), ignore_eos=True)
                core.add_requests([NewRequest(f"r{waiting}", tuple(prompt), params)])
            if rng.random() < 0.03:
                core.finish(f"r{rng.randint(waiting, 150)}", "abort")
            assert all(update.finish_reason != "error" for update in core.step().updates)
            core.scheduler.check_integrity()
            core.executor.check_integrity()
        stats = core.prefix_cache_stats()
        print(stats, core.scheduler.num_preemptions)
        assert stats.num_hit_tokens > 10_000 and stats.num_evicted_rows > 10
    torch.cuda.synchronize()
