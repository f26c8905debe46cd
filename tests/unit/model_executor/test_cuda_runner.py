"""The GPU's runner on the CPU: reference kernels, attention in a loop, graphs that run again what they should replay.

Steps that overlap must give what steps one after the other give, although their newest tokens are not known in time.
"""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from threading import Semaphore, Thread
from types import SimpleNamespace

import pytest
import torch
from llguidance import LLTokenizer, TokenizerWrapper

from sarathi.messages import (
    NO_TOKEN_LEFT,
    Chunk,
    NewRequest,
    PrefixGroup,
    SampledToken,
    SchedulerOutput,
    StepResult,
)
from sarathi.model_executor.architecture import ModelArchitecture, Rope
from sarathi.model_executor.attention.address import CacheLayer, SlotAddress
from sarathi.model_executor.attention.base import AttentionBackend, Capabilities
from sarathi.model_executor.attention.gpu_backend import GpuBackend
from sarathi.model_executor.attention.metadata import DeviceStep, StepMetadata, make_step, with_cascade
from sarathi.model_executor.models.decoder import Decoder
from sarathi.model_executor.ops.native import NativeOps
from sarathi.model_executor.ops.types import CascadeShape
from sarathi.model_executor.placement import Placement
from sarathi.model_executor.sampling.grammar import GrammarCompiler
from sarathi.sampling_params import SamplingParams
from sarathi.worker import cuda_runner
from sarathi.worker.cuda_graphs import DecodeGraph, Limits
from sarathi.worker.cuda_runner import CudaModelRunner
from sarathi.worker.piecewise_graphs import PiecewiseGraph
from sarathi.worker.sequences import SequenceTable

CPU = torch.device("cpu")
DTYPE = torch.float64  # in float32 some drawn tokens would hang on rounding, which differs with a batch's shape
SLOTS, LENGTH, VOCAB_SIZE = 7, 64, 50
ARCH = ModelArchitecture(
    "tiny", num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_size=8,
    vocab_size=VOCAB_SIZE, max_positions=LENGTH, rms_norm_eps=1e-5, rope=Rope(theta=1e4),
)  # fmt: skip


class LoopBackend(GpuBackend):
    """Attention over slots, one sequence after the other."""

    capabilities = Capabilities(captures_cuda_graphs=True)

    def __init__(self) -> None:
        super().__init__(ARCH, Placement(DTYPE, CPU), decode=None, fewest=1)

    def plan(self, batch, address) -> StepMetadata:
        return StepMetadata(make_step(batch.chunks, address, CPU))

    def plan_static(self, step: DeviceStep) -> StepMetadata:
        return StepMetadata(step)

    def attend(self, query, layer, metadata: StepMetadata, out=None):
        out, step = torch.zeros_like(query) if out is None else out, metadata.step
        for index, (first, last) in enumerate(zip(step.starts[:-1].tolist(), step.starts[1:].tolist(), strict=True)):
            slot, start, length = int(step.slots[index]), int(step.cached[index]), int(step.lengths[index])
            keys, values = (x[slot, :length].repeat_interleave(2, dim=1) for x in (layer.k, layer.v))
            scores = torch.einsum("qhd,khd->hqk", query[first:last], keys) * query.shape[-1] ** -0.5
            late = torch.arange(length)[None] > torch.arange(start, length)[:, None]
            weights = scores.masked_fill(late, float("-inf")).softmax(-1)
            out[first:last] = torch.einsum("hqk,khd->qhd", weights, values)
        return out


class CascadeBackend(LoopBackend):
    """Reads what sequences share where the plan says, and nowhere else."""

    cascade = CascadeShape(ranges=6, members=2, tile=1)

    def __init__(self) -> None:
        super().__init__()
        self.num_shared = 0

    def plan(self, batch, address) -> StepMetadata:
        step = make_step(batch.chunks, address, CPU)
        return StepMetadata(with_cascade(step, batch.groups, address.slots, batch.leading_decodes, self.cascade))

    def attend(self, query, layer, metadata: StepMetadata, out=None):
        caches, step = [layer.k.clone(), layer.v.clone()], metadata.step
        for index, (tokens, first, count, place) in enumerate([] if step.cascade is None else step.cascade[0].tolist()):
            own = int(step.slots[index])
            for cache in caches if tokens else ():
                cache[own, :tokens] = float("nan")
            for slot, begin, end, at, size in step.cascade.ranges[first : first + count].tolist():
                assert int(step.cascade.members[at + place]) == index and place < size <= self.cascade.members
                for cache, original in zip(caches, layer, strict=False):
                    cache[own, begin:end] = original[slot, begin:end]
            self.num_shared += count
        return super().attend(query, CacheLayer(*caches, None), metadata, out)


class Slots:
    """A cache's face: each request has the slot that it was given."""

    def __init__(self, slot_of: dict[str, int]) -> None:
        self._slot_of = slot_of

    def address(self, chunks) -> SlotAddress:
        return SlotAddress(tuple(self._slot_of[chunk.request_id] for chunk in chunks))

    def prefetch(self, chunks) -> None:
        pass


class Event:
    """A device that is always done."""

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner, "_mark", Event)
    for name, stand in (("CUDAGraph", SimpleNamespace), ("graph_pool_handle", lambda: None), ("synchronize", Event)):
        monkeypatch.setattr(torch.cuda, name, stand)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    capture = DecodeGraph.capture

    def capture_as_function(graph: DecodeGraph, compute, ops, pool) -> None:
        capture(graph, compute, ops, pool)
        graph._graph.replay = lambda: graph._tokens.copy_(graph._run(compute, ops)[0])  # where they always are

    monkeypatch.setattr(DecodeGraph, "capture", capture_as_function)
    capture_pieces = PiecewiseGraph.capture

    def capture_as_pieces(graph: PiecewiseGraph, pool) -> None:
        capture_pieces(graph, pool)
        pieces = Pieces(graph)
        for number, each in enumerate(graph._graphs):
            each.replay = pieces.resume if number else pieces.start

    monkeypatch.setattr(PiecewiseGraph, "capture", capture_as_pieces)


class Pieces:
    """Runs a step's layers again, up to the next call of attention at a time: in a thread that pauses there."""

    def __init__(self, graph: PiecewiseGraph) -> None:
        self._graph, self._goes_on, self._has_paused = graph, Semaphore(0), Semaphore(0)

    def start(self) -> None:
        Thread(target=self._run).start()
        self._has_paused.acquire()

    def resume(self) -> None:
        self._goes_on.release()
        self._has_paused.acquire()

    @torch.inference_mode()
    def _run(self) -> None:
        self._graph._stream.copy_(self._graph._run_layers(self._pause))
        self._has_paused.release()

    def _pause(self) -> None:
        self._has_paused.release()
        self._goes_on.acquire()


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make_model()


def make_model(backend: AttentionBackend | None = None) -> Decoder:
    torch.manual_seed(3)
    decoder = Decoder(ARCH, Placement(DTYPE, CPU), NativeOps(), backend or LoopBackend(), max_positions=LENGTH)
    for _, parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def bar_the_last_token(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[output[-1:]] = -torch.inf
    return logits


def params_of(rng: random.Random) -> SamplingParams:
    if rng.random() < 0.3:
        return SamplingParams(temperature=0.0)
    return SamplingParams(
        temperature=rng.choice([0.0, 0.8, 1.5]), top_p=rng.choice([1.0, 0.8]), top_k=rng.choice([-1, 20]),
        min_p=rng.choice([0.0, 0.05]), repetition_penalty=rng.choice([1.0, 1.5]), seed=rng.randrange(99),
        presence_penalty=rng.choice([0.0, 0.9]), frequency_penalty=rng.choice([0.0, 0.7]), min_tokens=3,
        stop_token_ids=(1, 2), logprobs=rng.choice([None, 2]), logit_bias=rng.choice([None, {4: 2.0}]),
        prompt_logprobs=rng.choice([None, 0, 3]), allowed_token_ids=rng.choice([None, range(3, 40)]),
        bad_words=rng.choice([(), [(7,), *((first, 9) for first in range(50))]]),
        logits_processors=rng.choice([(), [bar_the_last_token]]),
    )  # fmt: skip


def steps(prompts: dict[str, list[int]], num_outputs: int) -> Iterator[list[Chunk]]:
    """The second half joins later, in two chunks each; then all decode, but for one that pauses at times."""
    names = list(prompts)
    computed = dict.fromkeys(names, 0)
    for step in range(num_outputs):
        chunks = []
        for index, name in enumerate(names):
            begins, length = 2 * (index % 2), len(prompts[name])
            if step < begins or (index == 2 and step % 3 == 2):
                continue
            left = max(length - computed[name], 1)
            count = left // 2 if step == begins and left > 1 and index % 2 else left
            end = computed[name] + count
            chunks.append(Chunk(name, computed[name], count, end >= length, end))
            computed[name] = end
        yield chunks


def run(
    model: Decoder, requests: list[NewRequest], *, overlap: bool, graphs: bool, slots: list[int],
    prefixes: dict[int, int] | None = None,
) -> list[StepResult]:  # fmt: skip
    """prefixes: by first token of prompts, how many tokens those that begin with it share."""
    shape = (SLOTS, LENGTH, ARCH.num_kv_heads, ARCH.head_size)
    layers = [CacheLayer(*torch.zeros(2, *shape, dtype=DTYPE), None) for _ in range(ARCH.num_layers)]
    cache = Slots({each.request_id: slot for each, slot in zip(requests, slots, strict=False)})
    backend = model.layers[0].attention.backend
    runner = CudaModelRunner(model, backend, cache, layers, Limits(8, LENGTH, 0, cascade=backend.cascade))
    if graphs:
        runner.capture(max_tokens=40)
    sequences = SequenceTable(0, GrammarCompiler(VOCAB_SIZE, letters))
    sequences.add(requests)
    flights, results = [], []
    for chunks in steps({each.request_id: list(each.token_ids) for each in requests}, 9):
        firsts = {each.request_id: each.token_ids[0] for each in requests}
        out = SchedulerOutput(0, chunks=tuple(chunks), prefix_groups=groups_of(chunks, firsts, prefixes or {}))
        flights.append(runner.launch(out, sequences))
        if not overlap or len(flights) > 1:
            results.append(flights.pop(0).result())
    return [*results, *(flight.result() for flight in flights)]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("attempt", range(5))
def test_overlapped_steps_give_the_tokens_of_steps_one_by_one(model: Decoder, graphs: bool, attempt: int) -> None:
    """In the first attempts no step waits for tokens on the host: all are read from the device."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    needs_host = {} if attempt > 2 else {"bad_words": (), "logits_processors": ()}
    requests = [
        NewRequest(
            f"r{i}", tuple(rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 12))), replace(params_of(rng), **needs_host)
        )
        for i in range(5)
    ]
    assert attempt > 2 or not any(each.sampling_params.needs_host_tokens for each in requests)
    slots = rng.sample(range(SLOTS), 5)
    expected = run(model, requests, overlap=False, graphs=False, slots=slots)
    found = run(model, requests, overlap=True, graphs=graphs, slots=slots)
    assert sum(len(step.tokens) for step in expected) > 30
    for ours, theirs in zip(found, expected, strict=True):
        check_equal(ours.tokens, theirs.tokens)
        assert [span[:2] for span in ours.prompt_logprobs] == [span[:2] for span in theirs.prompt_logprobs]
        for span, other in zip(ours.prompt_logprobs, theirs.prompt_logprobs, strict=True):
            check_equal(span.tokens, other.tokens)
    check_prompts(requests, found)


def groups_of(chunks: list[Chunk], firsts: dict[str, int], prefixes: dict[int, int]) -> tuple[PrefixGroup, ...]:
    """Decodes that begin alike."""
    decodes = [index for index, chunk in enumerate(chunks) if chunk.start and chunk.num_tokens == 1]
    groups = [
        PrefixGroup(tokens, tuple(index for index in decodes if firsts[chunks[index].request_id] == first))
        for first, tokens in prefixes.items()
    ]
    return tuple(group for group in groups if len(group.members) > 1)


@pytest.mark.parametrize("graphs", [False, True])
def test_what_decodes_share_is_read_where_the_plan_says(model: Decoder, graphs: bool) -> None:
    """Two groups, whose members begin and pause at other times, in eager, mixed and replayed steps."""
    rng = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    prefixes = {first: [first, *rng.choices(range(VOCAB_SIZE), k=rng.randint(9, 30))] for first in (7, 8)}
    owners = [7, 8, 7, 8, 7, 7, 9]
    prompts = [prefixes.get(first, [9]) + rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 9)) for first in owners]
    requests = [NewRequest(f"r{i}", tuple(prompt), params_of(rng)) for i, prompt in enumerate(prompts)]
    slots = rng.sample(range(SLOTS), len(owners))
    expected = run(model, requests, overlap=False, graphs=False, slots=slots)
    backend = CascadeBackend()
    shared = {first: len(tokens) for first, tokens in prefixes.items()}
    found = run(make_model(backend), requests, overlap=True, graphs=graphs, slots=slots, prefixes=shared)
    for ours, theirs in zip(found, expected, strict=True):
        check_equal(ours.tokens, theirs.tokens)
    assert backend.num_shared > 50


LETTERS, LAST = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuv", 49  # token ids 0 to 47, and the end
PATTERN = "([A-M][a-k]){3}[0a-v]?"


class Letters:
    """A tokenizer of one token a letter, as llguidance wants it."""

    eos_token_id, bos_token_id, special_token_ids = LAST, None, [48, LAST]
    tokens = [text.encode() for text in (*LETTERS, "<a>", "<end>")]

    def __call__(self, text: bytes) -> list[int]:
        return [LETTERS.index(letter) for letter in text.decode()]


def letters(vocab_size: int) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Letters()))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("attempt", range(4))
def test_grammars_hold_and_overlapped_steps_give_the_same(model: Decoder, graphs: bool, attempt: int) -> None:
    """Some requests of a batch have one; after the end token any number of end tokens may follow."""
    rng = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    limited = [
        SamplingParams(temperature=0.0, structured_outputs={"regex": PATTERN}),
        SamplingParams(temperature=1.5, seed=3, repetition_penalty=1.3, structured_outputs={"regex": PATTERN}),
        SamplingParams(temperature=1.0, top_k=20, top_p=0.9, logprobs=2, structured_outputs={"regex": PATTERN}),
    ]
    params = rng.sample([*limited, *(params_of(rng) for _ in range(2))], 5)
    requests = [NewRequest(f"r{i}", tuple(rng.choices(range(48), k=rng.randint(1, 12))), params[i]) for i in range(5)]
    slots = rng.sample(range(SLOTS), 5)
    expected = run(model, requests, overlap=False, graphs=False, slots=slots)
    found = run(model, requests, overlap=True, graphs=graphs, slots=slots)
    for ours, theirs in zip(found, expected, strict=True):
        check_equal(ours.tokens, theirs.tokens)
    for request in requests:
        if request.sampling_params in limited:
            own = [token for step in found for token in step.tokens if token.request_id == request.request_id]
            text = "".join(LETTERS[token.token_id] if token.token_id < 48 else "$" for token in own)
            assert re.fullmatch(PATTERN + r"\$*", text) or (len(text) < 7 and "$" not in text), text


def test_a_grammar_that_fails_ends_its_request_alone(model: Decoder) -> None:
    requests = [
        NewRequest("good", (1, 2), SamplingParams(temperature=0.0, structured_outputs={"regex": PATTERN})),
        NewRequest("bad", (1, 2), SamplingParams(temperature=0.0, structured_outputs={"grammar": "start: <|none|>"})),
        NewRequest("free", (1, 2), SamplingParams(temperature=0.0)),
    ]
    alone = run(model, [requests[0], requests[2]], overlap=True, graphs=True, slots=[0, 2])
    found = run(model, requests, overlap=True, graphs=True, slots=[0, 1, 2])
    tokens = {name: [t for step in found for t in step.tokens if t.request_id == name] for name in ("good", "bad")}
    assert {token.token_id for token in tokens["bad"]} == {NO_TOKEN_LEFT}
    first = [token for step in alone for token in step.tokens if token.request_id == "good"]
    assert [t.token_id for t in tokens["good"]][: len(first)] == [t.token_id for t in first][: len(tokens["good"])]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_request_whose_logits_are_not_finite_leaves_the_others_as_they_are(graphs: bool, overlap: bool) -> None:
    """Steps behind it, launched before that is known, compute on token 0."""
    rng = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    decoder, last = make_model(), VOCAB_SIZE - 1
    decoder.head.weight[last] = 0.0  # never the largest, and no other request may draw it
    prompts = [rng.choices(range(last), k=rng.randint(2, 12)) for _ in range(5)]
    params = [each if each.is_plain else replace(each, logit_bias={last: -100.0}) for each in map(params_of, [rng] * 5)]
    requests = [NewRequest(f"r{i}", tuple(prompts[i]), params[i]) for i in range(5)]
    slots, broken = rng.sample(range(SLOTS), 5), f"r{rng.randrange(5)}"
    expected = run(decoder, requests, overlap=False, graphs=False, slots=slots)
    decoder.embedding.weight[last] = float("nan")
    requests = [
        replace(each, token_ids=(last, *each.token_ids[1:])) if each.request_id == broken else each for each in requests
    ]
    found = run(decoder, requests, overlap=overlap, graphs=graphs, slots=slots)
    for ours, theirs in zip(found, expected, strict=True):
        check_equal(*([token for token in step.tokens if token.request_id != broken] for step in (ours, theirs)))
    assert {token.token_id for step in found for token in step.tokens if token.request_id == broken} == {-1}


def check_equal(ours: Sequence[SampledToken], theirs: Sequence[SampledToken]) -> None:
    assert [token[:2] for token in ours] == [token[:2] for token in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top_logprobs] == [token for token, _ in other.top_logprobs]


def check_prompts(requests: list[NewRequest], found: list[StepResult]) -> None:
    """Every token of a prompt but the first, once, where that was asked for."""
    spans = [span for step in found for span in step.prompt_logprobs]
    for request in requests:
        own = [token for span in spans if span.request_id == request.request_id for token in span.tokens]
        is_asked = request.sampling_params.prompt_logprobs is not None
        assert [token.token_id for token in own] == (list(request.token_ids[1:]) if is_asked else [])
        assert all(len(token.top_logprobs) == request.sampling_params.prompt_logprobs for token in own)
