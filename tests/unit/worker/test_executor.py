"""The executor's promises to a scheduler: memory that runs out, requests that come back, order, settings."""

import gc
import json
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_driver import RandomDriver
from tiny_models import TinyModel, build, compute_in_float64, random_prompts

from sarathi import LLM
from sarathi.config.load import make_config
from sarathi.entrypoints.cli import main
from sarathi.executor import uniproc
from sarathi.executor.uniproc import UniprocExecutor, UnsupportedParallelismError
from sarathi.messages import Chunk, NewRequest, SchedulerOutput
from sarathi.sampling_params import SamplingParams
from sarathi.worker.cache_engine import vattn

GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
BACKENDS = ("sdpa_paged_4", "sdpa_vattn_4kb", "sdpa_vattn_megacache_sync_4kb")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyModel:
    return build("llama2", tmp_path_factory.mktemp("llama2"))


def make_executor(tiny: TinyModel, backend: str = "sdpa_vattn_4kb", **settings) -> UniprocExecutor:
    defaults = {"device": "cpu", "memory_bytes": 2**21, "max_num_seqs": 8}
    return UniprocExecutor(make_config(model=str(tiny.folder), attention_backend=backend, **{**defaults, **settings}))


def new(name: str, tokens: list[int], params: SamplingParams = GREEDY) -> NewRequest:
    return NewRequest(name, tuple(tokens), params)


def whole(name: str, tokens: list[int], granted: int | None = None) -> Chunk:
    return Chunk(name, 0, len(tokens), True, granted or len(tokens))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixed_batch_gives_what_each_request_alone_gives(
    tiny: TinyModel, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in_float64(monkeypatch)
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    prompts = dict(random_prompts(seed, 8, 30))
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=seed, repetition_penalty=1.1, max_tokens=64)
    executor = make_executor(tiny, backend)
    together = RandomDriver(executor, seed).run(prompts, params, 8)
    driver = RandomDriver(executor, seed + 1)
    alone = {name: driver.run({name: prompt}, params, 8)[name] for name, prompt in prompts.items()}
    assert together == alone


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_of_earlier_requests_is_never_seen(tiny: TinyModel, backend: str) -> None:
    """Every byte of the cache is made NaN through the kernels' own tensors before each of two requests."""
    executor = make_executor(tiny, backend, max_num_seqs=1)
    prompt = list(range(20))
    expected = int(tiny.logprobs(prompt)[-1].argmax())
    for name in "ab":
        blocks = tuple(range(64, 128)) if "paged" in backend else ()
        executor.execute(SchedulerOutput(0, (new("filler", [1] * 200),), (Chunk("filler", 0, 200, True, 200, blocks),)))
        _fill_with_nan(executor, 200)
        executor.execute(SchedulerOutput(1, finished=("filler",)))
        blocks = tuple(range(64, 69)) if "paged" in backend else ()
        out = SchedulerOutput(2, (new(name, prompt),), (Chunk(name, 0, 20, True, 20, blocks),))
        assert executor.execute(out).tokens[0].token_id == expected
        executor.execute(SchedulerOutput(3, finished=(name,)))


def _fill_with_nan(executor: UniprocExecutor, tokens: int) -> None:
    cache = executor._worker._cache
    for index in range(3):
        for tensor in cache.layer(index):
            if cache.block_size is not None:
                tensor.fill_(float("nan"))
            else:
                tensor[0, :tokens] = float("nan")


def test_memory_that_runs_out_is_an_answer_and_changes_nothing(
    tiny: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    executor = make_executor(tiny, memory_bytes=6 * 4096 * 4, max_num_seqs=4)
    rows = executor.capacity.rows
    fits, too_much = [3] * executor.capacity.tokens_in(rows - 1), [5] * executor.capacity.tokens_in(2)
    first = executor.execute(SchedulerOutput(0, (new("a", fits),), (whole("a", fits),)))
    assert first.available_rows is None and len(first.tokens) == 1
    step = Chunk("a", len(fits), 1, True, len(fits) + 1)
    failed = executor.execute(SchedulerOutput(1, (new("b", too_much),), (step, whole("b", too_much))))
    assert failed.tokens == () and failed.available_rows == rows
    assert f"step 1: active slots need {rows + 2} rows" in caplog.text
    executor.check_integrity()
    behind = executor.execute(SchedulerOutput(2, chunks=(step,)))  # sent before the failure was known
    assert behind.tokens == () and behind.available_rows == rows
    again = executor.execute(SchedulerOutput(3, chunks=(step,), num_recoveries=1))
    expected = tiny.logprobs([*fits, first.tokens[0].token_id])[-1].argmax()
    assert again.tokens[0].token_id == int(expected)
    later = executor.execute(SchedulerOutput(4, chunks=(whole("b", too_much),), finished=("a",), num_recoveries=1))
    assert later.tokens[0].token_id == int(tiny.logprobs(too_much)[-1].argmax())


def test_an_anchored_cache_keeps_its_first_page_and_says_nothing_of_it(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a launcher must find memory behind a tensor's address whatever its slots hold."""
    plain = make_executor(tiny, memory_bytes=6 * 4096 * 4, max_num_seqs=4).capacity.rows
    monkeypatch.setattr(vattn, "needs_anchor", lambda device: True)
    executor = make_executor(tiny, memory_bytes=6 * 4096 * 4, max_num_seqs=4)
    rows = executor.capacity.rows
    assert rows == plain - 1
    prompt = [3] * executor.capacity.tokens_in(rows)
    out = executor.execute(SchedulerOutput(0, (new("a", prompt),), (whole("a", prompt),)))
    assert out.tokens[0].token_id == int(tiny.logprobs(prompt)[-1].argmax())
    more = Chunk("a", len(prompt), 1, True, executor.capacity.tokens_in(rows) + 1)
    assert executor.execute(SchedulerOutput(1, chunks=(more,))).available_rows == rows
    executor.execute(SchedulerOutput(2, finished=("a",), num_recoveries=1))
    stats = executor.memory_stats()
    assert stats.mapped_bytes == stats.idle_bytes == stats.created_bytes and stats.wasted_bytes == 0
    executor._worker._cache._cache.reclaim_idle()
    assert executor.memory_stats().mapped_bytes == 0
    for index in range(3):
        assert all(tensor[0, 0].isfinite().all() for tensor in executor._worker._cache.layer(index))


@pytest.mark.parametrize("backend", BACKENDS)
def test_wasted_is_what_is_mapped_past_the_last_token_whole_rows_being_granted(tiny: TinyModel, backend: str) -> None:
    llm = LLM(model=str(tiny.folder), device="cpu", attention_backend=backend, memory_bytes=2**21, max_num_seqs=8)
    executor, lengths = llm.engine.core.executor, (5, 9, 18)
    for length in lengths:
        llm.engine.add_request(str(length), [3] * length, GREEDY)
    llm.engine.step()
    stats, token_bytes = executor.memory_stats(), executor.token_bytes * sum(lengths)
    assert 0 < stats.wasted_bytes == stats.mapped_bytes - stats.idle_bytes - token_bytes
    llm.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_request_whose_logits_are_not_finite_ends_alone(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token of the vocabulary has an embedding of NaN. The reference: the other requests without that one."""
    compute_in_float64(monkeypatch)
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    tiny = build("llama2", tmp_path)
    embedding = tiny.reference.model.embed_tokens.weight
    with torch.no_grad():
        embedding[96] = float("nan")
    tiny.reference.save_pretrained(tmp_path)
    prompts = [[token % 96 for token in prompt] for _, prompt in random_prompts(seed, 5, 30)]
    common = {"seed": seed, "max_tokens": 9, "ignore_eos": True, "logprobs": 2, "logit_bias": {96: -100.0}}
    params = [SamplingParams(temperature=index % 2, **common) for index in range(5)]
    settings = {"device": "cpu", "memory_bytes": 2**21, "max_num_seqs": 8, "chunk_size": 16}
    with LLM(model=str(tmp_path), attention_backend=backend, **settings) as llm:
        cache = llm.engine.core.executor._worker._cache
        if "paged" in backend:
            cache._keys.zero_(), cache._values.zero_()  # a CPU's memory is whatever was there
        expected = llm.generate(prompts, params, use_tqdm=False)
        broken = [[5, 96, 7], *prompts[:3], [96] * 40, *prompts[3:]]
        asked = [replace(params[0], prompt_logprobs=1), *params[:3], params[1], *params[3:]]
        found = llm.generate(broken, asked, use_tqdm=False)
        again = llm.generate(prompts, params, use_tqdm=False)  # in memory that held NaN
        if "paged" in backend:
            assert all(tensor.isfinite().all() for index in range(3) for tensor in cache.layer(index))
        llm.engine.core.executor.check_integrity()
    ended = [found.pop(4), found.pop(0)]
    for outputs in (found, again):
        assert [output.outputs[0].token_ids for output in outputs] == [each.outputs[0].token_ids for each in expected]
    for output in ended:
        [completion] = output.outputs
        assert (completion.finish_reason, completion.token_ids) == ("error", [])
        assert "logits are not finite" in str(completion.stop_reason)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_logits_processor_that_raises_ends_its_own_request(
    tiny: TinyModel, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference: the other requests without that one."""
    compute_in_float64(monkeypatch)

    def fail_at_the_third(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 2:
            raise LookupError("no such word")
        return logits

    seed = random.randrange(2**31)
    print(f"seed {seed}")
    prompts = [prompt for _, prompt in random_prompts(seed, 4, 30)]
    params = [SamplingParams(temperature=index % 2, seed=seed, max_tokens=9, ignore_eos=True) for index in range(4)]
    settings = {"device": "cpu", "memory_bytes": 2**21, "max_num_seqs": 8, "chunk_size": 16}
    with LLM(model=str(tiny.folder), attention_backend=backend, **settings) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
        broken = replace(params[1], logits_processors=[fail_at_the_third])
        asked = [params[0], broken, *params[1:]]
        found = llm.generate([prompts[0], prompts[1], *prompts[1:]], asked, use_tqdm=False)
        llm.engine.core.executor.check_integrity()
    [failed] = found.pop(1).outputs
    assert [output.outputs[0].token_ids for output in found] == expected
    assert (failed.finish_reason, failed.token_ids) == ("error", expected[1][:2])
    assert failed.stop_reason == "a logits processor failed: LookupError: no such word"


def test_json_has_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = build("llama2", tmp_path)
    with torch.no_grad():
        tiny.reference.model.embed_tokens.weight[96] = float("nan")
    tiny.reference.save_pretrained(tmp_path)
    words = ["generate", "--prompt-token-ids", "5,96,7", "--json", "--model", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--prompt-logprobs", "1", "--memory-bytes", "2mb"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert shown["outputs"][0]["finish_reason"] == "error"
    assert [entry[0]["logprob"] for entry in shown["prompt_logprobs"][1:]][1:] == [None]


def test_a_preempted_request_comes_back_with_its_output(tiny: TinyModel) -> None:
    executor = make_executor(tiny)
    prompt = [4, 8, 15, 16, 23, 42]
    first = executor.execute(SchedulerOutput(0, (new("a", prompt),), (whole("a", prompt),))).tokens[0].token_id
    assert executor.memory_stats().wasted_bytes > 0
    executor.execute(SchedulerOutput(1, preempted=("a",)))
    assert executor.memory_stats().wasted_bytes == 0
    tokens = [*prompt, first]
    second = executor.execute(SchedulerOutput(2, chunks=(whole("a", tokens),))).tokens[0].token_id
    assert second == int(tiny.logprobs(tokens)[-1].argmax())


def test_only_chunks_that_reach_the_end_sample_and_in_their_order(tiny: TinyModel) -> None:
    executor = make_executor(tiny)
    prompts = dict(random_prompts(3, 4, 20))
    chunks = [whole(name, prompt) for name, prompt in prompts.items()]
    chunks[1] = chunks[1]._replace(num_tokens=1, samples=False)
    out = SchedulerOutput(7, tuple(new(*each) for each in prompts.items()), tuple(chunks))
    result = executor.execute(out)
    assert result.step_id == 7 and result.model_s > 0
    assert [token.request_id for token in result.tokens] == ["r0", "r2", "r3"]
    assert executor.execute(SchedulerOutput(8, finished=tuple(prompts))).tokens == ()
    assert executor.execute(SchedulerOutput(9, finished=("never-heard-of",))).tokens == ()


def test_a_sync_backend_never_maps_ahead(tiny: TinyModel) -> None:
    def waited(backend: str) -> int:
        executor = make_executor(tiny, backend)
        tokens_of_a_page = executor.capacity.tokens_in(1)
        prompt = [1] * (tokens_of_a_page - 4)
        executor.execute(SchedulerOutput(0, (new("a", prompt),), (whole("a", prompt),)))
        for length in range(len(prompt) + 1, len(prompt) + 3 * tokens_of_a_page):
            executor.execute(SchedulerOutput(length, chunks=(Chunk("a", length - 1, 1, True, length),)))
        return executor.memory_stats().steps_waited

    assert (waited("sdpa_vattn_4kb"), waited("sdpa_vattn_sync_4kb")) == (1, 4)


def test_dummy_weights_run_at_any_length(tmp_path: Path, tiny: TinyModel) -> None:
    executor = make_executor(tiny, load_format="dummy", max_model_len=1000)
    assert (executor.max_model_len, executor.vocab_size) == (1000, 97)
    prompt = [1] * 300  # more than the model has positions for
    logged = SamplingParams(temperature=0.0, logprobs=1)
    token = executor.execute(SchedulerOutput(0, (new("a", prompt, logged),), (whole("a", prompt),))).tokens[0]
    assert -20 < token.logprob < 0


def test_bfloat16_stays_near_float32(tiny: TinyModel) -> None:
    executor = make_executor(tiny, dtype="bfloat16")
    prompt = list(range(30))
    params = SamplingParams(temperature=0.0, logprobs=97)
    top = (
        executor.execute(SchedulerOutput(0, (new("a", prompt, params),), (whole("a", prompt),))).tokens[0].top_logprobs
    )
    expected = tiny.logprobs(prompt)[-1]
    assert max(abs(float(expected[token]) - value) for token, value in top) < 0.6


def test_no_op_runs_and_samples(tiny: TinyModel) -> None:
    executor = make_executor(tiny, "no_op")
    assert len(executor.execute(SchedulerOutput(0, (new("a", [1, 2]),), (whole("a", [1, 2]),))).tokens) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"max_model_len": 257}, "max_model_len=257: the model has positions for at most 256"),
        ({"memory_bytes": 1000}, "memory_bytes=1000"),
        (
            {"memory_bytes": 1000, "attention_backend": "sdpa_paged_16"},
            "memory_bytes=1000 is less than one block of 16",
        ),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "cuda:99"}, "device='cuda:99': this machine has"),
        ({"attention_backend": "sdpa_vattn_5kb"}, "page"),
        ({"attention_backend": "fa_vattn"}, "runs on cuda, not on cpu"),
    ],
)
def test_settings_that_cannot_work_are_value_errors(tiny: TinyModel, settings: dict, message: str) -> None:
    base = {"model": str(tiny.folder), "device": "cpu", "attention_backend": "sdpa_vattn_4kb"}
    with pytest.raises(ValueError, match=message):
        UniprocExecutor(make_config(**{**base, **settings}))


def test_parallelism_error_is_its_own_class(tiny: TinyModel) -> None:
    with pytest.raises(UnsupportedParallelismError):
        make_executor(tiny, pipeline_parallel_size=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shutdown_leaves_neither_weights_nor_cache(tiny: TinyModel, backend: str) -> None:
    executor = make_executor(tiny, backend)
    prompt = NewRequest("a", (1, 2), GREEDY)
    blocks = (0,) if "paged" in backend else ()
    executor.execute(SchedulerOutput(0, (prompt,), (Chunk("a", 0, 2, True, 2, blocks),)))
    worker = executor._worker
    parts = [weakref.ref(part) for part in (worker._cache, worker._runner, worker.model, worker.model.embedding.weight)]
    del worker
    executor.shutdown()
    executor.shutdown()
    assert [part() is None for part in parts] == [True] * len(parts)
    assert executor.memory_stats().created_bytes == 0
    for use in (lambda: executor.execute(SchedulerOutput(1)), lambda: executor.model):
        with pytest.raises(RuntimeError, match="the executor is shut down"):
            use()


@pytest.fixture
def thawed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the heap of executors. Those of other tests that nobody shut down are gone."""
    monkeypatch.setattr(uniproc, "_FROZEN", uniproc._FrozenHeap())
    gc.unfreeze()
    gc.collect()
    assert gc.get_freeze_count() == 0
    yield
    assert gc.get_freeze_count() == 0
    gc.freeze()  # as tests/conftest.py does


def test_the_last_executor_to_go_thaws_the_heap(tiny: TinyModel, thawed: None) -> None:
    first, second, third = (make_executor(tiny) for _ in range(3))
    frozen = gc.get_freeze_count()
    second.shutdown()
    second.shutdown()
    del third  # without a shutdown
    assert frozen and gc.get_freeze_count() > frozen / 2
    first.shutdown()


def test_garbage_is_not_frozen(tiny: TinyModel, thawed: None) -> None:
    class Node:
        pass

    node = Node()
    node.itself = node
    garbage = weakref.ref(node)
    gc.disable()
    del node
    gc.enable()
    executor = make_executor(tiny)
    gc.collect()
    assert garbage() is None
    executor.shutdown()
