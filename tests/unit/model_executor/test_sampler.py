"""Sampling of whole batches against transformers' processors row by row, and against definitions of the rest."""

import random
from array import array
from dataclasses import fields, is_dataclass

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sarathi.messages import NO_TOKEN_LEFT, NOT_FINITE, NewRequest
from sarathi.model_executor.ops.native import NativeOps
from sarathi.model_executor.sampling.plan import SamplingPlan, plan_sampling, with_last_tokens
from sarathi.model_executor.sampling.sampler import filtered, sample
from sarathi.sampling_params import SamplingParams
from sarathi.worker.sequences import Sequence, SequenceTable
from sarathi.worker.transfer import to_device

VOCAB_SIZE = 3000  # more than the sampler sorts at first
KERNELS = NativeOps()


def sequence(params: SamplingParams, prompt: list[int], output: list[int] = (), seed: int = 1) -> Sequence:
    return Sequence(array("q", [*prompt, *output]), len(prompt), params, frozenset({7}), seed)


def plan_of(sequences: list[Sequence], vocab_size: int) -> SamplingPlan:
    return plan_sampling([each.next_token(len(each.token_ids)) for each in sequences], vocab_size)


def tokens_of(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return sample(logits, plan_of(sequences, logits.shape[1]), KERNELS).token_ids.tolist()


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.uniform(0.3, 2.0),
        top_k=rng.choice([-1, 0, 1, 5, 200, VOCAB_SIZE, 10 * VOCAB_SIZE]),
        top_p=rng.choice([1.0, 0.05, 0.5, 0.9, 0.9999]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.3]),
    )


def filtered_by_transformers(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    steps = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k > 0:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        steps.append(MinPLogitsWarper(params.min_p))
    row = row.unsqueeze(0).clone()
    for step in steps:
        row = step(torch.zeros(1, 1, dtype=torch.long), row)
    return row[0]


@pytest.mark.parametrize("seed", range(20))
def test_filters_equal_transformers(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    params = [random_params(rng) for _ in range(9)]
    logits = torch.randn(len(params), VOCAB_SIZE) * rng.choice([0.1, 1.0, 5.0])
    draws = plan_of([sequence(each, [1]) for each in params], VOCAB_SIZE).draws
    found = filtered(logits.clone(), draws, KERNELS)
    for row, each in enumerate(params):
        expected = filtered_by_transformers(logits[row], each)
        differing = (found[row].isinf() != expected.isinf()).sum()
        assert differing <= 1, (seed, row, each)  # the last token of a nucleus may fall either way by rounding
        both = ~(found[row].isinf() | expected.isinf())
        torch.testing.assert_close(found[row][both], expected[both])


def test_repetition_penalty_equals_transformers() -> None:
    logits = torch.randn(3, VOCAB_SIZE) * 4
    prompts = [torch.randint(0, VOCAB_SIZE, (n,)).tolist() for n in (1, 30, 400)]
    sequences = [
        sequence(SamplingParams(temperature=0.0, repetition_penalty=penalty), prompt, [5, 5, 9])
        for penalty, prompt in zip((1.0, 1.7, 0.4), prompts, strict=True)
    ]
    expected = [
        RepetitionPenaltyLogitsProcessor(each.params.repetition_penalty)(
            torch.tensor([each.token_ids]), row[None].clone()
        )
        for each, row in zip(sequences, logits, strict=True)
    ]
    assert tokens_of(logits, sequences) == torch.cat(expected).argmax(-1).tolist()


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = torch.zeros(1, 6)
    logits[0] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    prompt, output = [1, 1, 1], [0, 0, 2]

    def best(**penalty: float) -> int:
        return tokens_of(logits, [sequence(SamplingParams(temperature=0.0, **penalty), prompt, output)])[0]

    assert best() == 0
    assert best(presence_penalty=0.9) == 0  # 4.1 > 4.0
    assert best(presence_penalty=1.1) == 1
    assert best(frequency_penalty=0.4) == 0  # 4.2 > 4.0
    assert best(frequency_penalty=0.6) == 1  # two of token 0: 3.8
    assert best(presence_penalty=-2.0, frequency_penalty=-2.0) == 0


def test_logit_bias_and_ids_outside_the_vocabulary() -> None:
    logits = torch.randn(2, 50)
    biased = SamplingParams(temperature=0.0, logit_bias={13: 100.0, 50: 100.0})
    found = tokens_of(logits, [sequence(biased, [1]), sequence(SamplingParams(temperature=0.0), [1])])
    assert found == [13, int(logits[1].argmax())]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_holds_back_every_end(temperature: float) -> None:
    logits = torch.full((3, 10), -5.0)
    logits[:, 7], logits[:, 3], logits[:, 4] = 50.0, 40.0, 30.0
    params = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=(3,), seed=1)
    ignoring = SamplingParams(temperature=temperature, min_tokens=2, stop_token_ids=(3,), ignore_eos=True, seed=1)
    sequences = [sequence(params, [1], [2]), sequence(params, [1], [2, 2]), sequence(ignoring, [1], [2])]
    assert tokens_of(logits, sequences) == [4, 7, 7]


def test_greedy_is_argmax_with_the_lowest_of_equals() -> None:
    logits = torch.zeros(2, 100)
    logits[0, [20, 60]] = 1.0
    assert tokens_of(logits, [sequence(SamplingParams(temperature=0.0), [1])] * 2) == [20, 0]


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_are_not_finite_have_no_token_and_rows_beside_them_are_as_ever(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, logprobs=2)]
    kinds += [random_params(rng) for _ in range(6)]
    kinds += [SamplingParams(repetition_penalty=1.3, logprobs=1), SamplingParams(logit_bias={3: 2.0}, min_tokens=4)]
    logits = torch.randn(len(kinds), 300, generator=torch.Generator().manual_seed(seed))
    sequences = [sequence(params, [1, 2], [3], seed=index) for index, params in enumerate(kinds)]
    expected = tokens_of(logits, sequences)
    broken = rng.sample(range(len(kinds)), 4)
    for row, value in zip(broken, (float("nan"), float("inf"), float("nan"), float("inf")), strict=True):
        logits[row, rng.randrange(300)] = value
    assert tokens_of(logits, sequences) == [-1 if row in broken else token for row, token in enumerate(expected)]


def test_logits_of_tokens_that_are_not_allowed_are_looked_at_too() -> None:
    logits = torch.zeros(3, 9)
    logits[0, 5], logits[1, 5] = float("nan"), float("inf")
    params = SamplingParams(temperature=0.0, allowed_token_ids=(1, 2), logprobs=1)
    assert tokens_of(logits, [sequence(params, [1])] * 3) == [-1, -1, 1]


def logits_with_a_best() -> torch.Tensor:
    """[4, VOCAB_SIZE], of which the largest exceeds the others by 10 or more."""
    logits = 100 * torch.randn(4, VOCAB_SIZE)
    best = torch.randint(0, VOCAB_SIZE, (4, 1))
    return logits.scatter_(1, best, logits.amax(1, keepdim=True) + 10)


def test_top_k_1_draws_the_best() -> None:
    logits = logits_with_a_best()
    found = tokens_of(logits, [sequence(SamplingParams(top_k=1), [1], seed=seed) for seed in range(4)])
    assert found == logits.argmax(-1).tolist()


@pytest.mark.parametrize("fields", [{"temperature": 1e-38}, {"temperature": 1e-5}, {"top_p": 1e-50}, {"top_p": 1e-40}])
def test_what_all_but_rules_out_a_draw_gives_the_best(fields: dict[str, float]) -> None:
    logits = logits_with_a_best()
    found = tokens_of(logits, [sequence(SamplingParams(**fields), [1], seed=seed) for seed in range(4)])
    assert found == logits.argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [1e-10, 1e10])
def test_the_largest_penalties_leave_numbers(penalty: float) -> None:
    logits = 100 * torch.randn(1, 50)
    params = SamplingParams(temperature=1e-5, repetition_penalty=penalty, top_p=0.9)
    [token] = tokens_of(logits, [sequence(params, list(range(25)))])
    scores = logits[0].double()
    scores[:25] = torch.where(scores[:25] > 0, scores[:25] / penalty, scores[:25] * penalty)
    assert token == int(scores.argmax())


def test_a_seed_and_its_negative_are_two_streams() -> None:
    seeds = [7, -7, 0, 2**63 - 1, -(2**63), -(2**63) + 1, -1, 1]
    table = SequenceTable(seed=0)
    table.add(NewRequest(str(each), (1,), SamplingParams(seed=each)) for each in seeds)
    assert len({table[str(each)].uniform(1) for each in seeds}) == len(seeds)


def test_draws_follow_the_distribution() -> None:
    seed, count = random.randrange(2**31), 40_000
    print(f"seed {seed}")
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025, 0.0]))
    rows = [sequence(SamplingParams(), [1], seed=seed + row * 0x5DEECE66D) for row in range(count)]
    drawn = tokens_of(logits.expand(count, 6).contiguous(), rows)
    found = torch.bincount(torch.tensor(drawn), minlength=6) / count
    assert found[5] == 0
    assert (found - logits.exp()).abs().max() < 0.015  # six standard deviations


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    logits = torch.randn(5, VOCAB_SIZE)
    table = SequenceTable(seed=0)
    table.add(NewRequest(f"r{i}", (1, 2), SamplingParams(seed=i, top_p=0.9)) for i in range(5))
    rows = [table[f"r{i}"] for i in range(5)]
    together = tokens_of(logits, rows)
    assert [tokens_of(logits[i : i + 1], [rows[i]])[0] for i in range(5)] == together
    assert tokens_of(logits.flip(0), rows[::-1]) == together[::-1]


def test_seeds_and_positions_change_the_draw() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    draws = {
        tokens_of(logits, [sequence(SamplingParams(), [1] * n, seed=seed)])[0] for n in (1, 2, 3) for seed in range(9)
    }
    assert len(draws) > 20


def test_requests_without_a_seed_differ_but_repeat_with_the_engine() -> None:
    def uniforms(engine_seed: int) -> list[float]:
        table = SequenceTable(engine_seed)
        table.add(NewRequest(name, (1,), SamplingParams()) for name in "ab")
        return [table["a"].uniform(1), table["b"].uniform(1)]

    assert uniforms(3) == uniforms(3) != uniforms(4)
    assert len(set(uniforms(3))) == 2


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(4, 200)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.3, logprobs=0, seed=3),
        SamplingParams(temperature=0.0, logprobs=3, logit_bias={11: 100.0}),
        SamplingParams(temperature=2.0, logprobs=10_000, repetition_penalty=1.3),
    ]
    before = logits.clone()
    plan = plan_of([sequence(each, [1]) for each in params], 200)
    found = sample(logits, plan, KERNELS)
    expected = before.double().log_softmax(-1)
    assert torch.equal(logits, before)
    assert plan.logprobs.counts == (None, 0, 3, 200)
    for row, index in enumerate((1, 2, 3)):
        assert found.logprobs.chosen[row].double() == pytest.approx(
            float(expected[index, found.token_ids[index]]), abs=1e-5
        )
        torch.testing.assert_close(
            found.logprobs.top[row].double(), expected[index].sort(descending=True).values, atol=1e-5, rtol=0
        )
    assert found.token_ids[2] == 11


def test_bad_words_equal_transformers() -> None:
    """Their processor looks at prompt and output together; ours, as vLLM's, at the output: it is given that alone."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(50):
        words = [tuple(rng.choices(range(6), k=rng.randint(1, 3))) for _ in range(rng.randint(1, 5))]
        output = rng.choices(range(6), k=rng.randint(1, 6))
        logits = torch.randn(1, 6)
        expected = NoBadWordsLogitsProcessor([list(word) for word in words])(torch.tensor([output]), logits.clone())
        if expected.isinf().all():
            continue
        params = SamplingParams(temperature=0.0, bad_words=words)
        assert tokens_of(logits, [sequence(params, words[0][:-1], output)]) == [int(expected.argmax())], (words, output)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen(temperature: float) -> None:
    logits = torch.randn(3, 50)
    allowed = [9, 33, 2]
    rows = [
        sequence(
            SamplingParams(temperature=temperature, allowed_token_ids=allowed, seed=seed, logit_bias={4: 99.0}), [1]
        )
        for seed in range(2)
    ]
    free = sequence(SamplingParams(temperature=0.0), [1])
    found = tokens_of(logits, [rows[0], free, rows[1]])
    assert found[1] == int(logits[1].argmax()) and {found[0], found[2]} <= set(allowed)
    if not temperature:
        assert found[0] == max(allowed, key=lambda token_id: float(logits[0, token_id]))


def test_logits_processors_get_tokens_and_logits_and_may_return_others() -> None:
    seen = []

    def best_is_last_output(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((output, logits.dtype, tuple(logits.shape)))
        logits[output[-1]] = 100.0
        return logits

    def best_is_first_of_prompt(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(prompt[0]), len(logits)).float() + len(output)

    logits = torch.randn(3, 50, dtype=torch.bfloat16)
    before = logits.clone()
    params = [
        SamplingParams(temperature=0.0, logits_processors=[each])
        for each in (best_is_last_output, best_is_first_of_prompt)
    ]
    rows = [
        sequence(params[0], [1, 2], [3, 4]),
        sequence(params[1], [6, 2], [3]),
        sequence(SamplingParams(temperature=0.0), [1]),
    ]
    assert tokens_of(logits, rows) == [4, 6, int(logits[2].argmax())]
    assert seen == [([3, 4], torch.float32, (50,))] and torch.equal(logits, before)


def processed_by(function: object, **params: object) -> Sequence:
    return sequence(SamplingParams(logits_processors=[function], seed=3, **params), [1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logits_processor_that_fails_leaves_its_own_row_without_a_token(temperature: float) -> None:
    def fail(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits.fill_(3.0)
        raise LookupError("no such word")

    wrong = [
        fail,
        lambda output, logits: logits[:3],
        lambda: None,
        lambda output, logits: logits.fill_(-torch.inf),
        lambda output, logits: logits / 0,
        lambda output, logits: None,
    ]
    logits = torch.randn(8, 50)
    plain = sequence(SamplingParams(temperature=temperature, seed=9), [1])
    rows = [plain, *(processed_by(each, temperature=temperature) for each in wrong), plain]
    found = sample(logits, plan_of(rows, 50), KERNELS)
    alone = [tokens_of(logits[row : row + 1], [plain])[0] for row in (0, 7)]
    assert found.token_ids.tolist() == [alone[0], *[NO_TOKEN_LEFT] * 6, alone[1]]
    assert found.errors == {
        1: "a logits processor failed: LookupError: no such word",
        2: "a logits processor failed: ValueError: it returned [3]: it must return logits of shape [50]",
        3: found.errors[3],
        6: "a logits processor failed: ValueError: it returned None: it must return logits of shape [50]",
    }
    assert "takes 0 positional arguments but 2 were given" in found.errors[3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parameters_that_leave_no_token_are_told_from_a_model_that_breaks(temperature: float) -> None:
    logits = torch.randn(4, 6)
    logits[1] = float("nan")
    rules = {"temperature": temperature, "allowed_token_ids": [2, 3], "seed": 1}
    none_left = SamplingParams(**rules, bad_words=[(5, 2), (5, 3)])
    hidden = processed_by(lambda output, logits: torch.zeros_like(logits), temperature=temperature)
    rows = [sequence(none_left, [1], [5]), sequence(none_left, [1], [5]), sequence(none_left, [5], [1])]
    found = tokens_of(logits, [*rows, hidden])
    assert found[:2] == [NO_TOKEN_LEFT, NOT_FINITE] and found[2] in (2, 3) and found[3] >= 0
    logits[3, 4] = float("inf")
    assert tokens_of(logits[3:], [hidden]) == [NOT_FINITE]


def test_mixed_rows_keep_their_own_parameters() -> None:
    logits = torch.randn(3, VOCAB_SIZE)
    alone = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=5),
        SamplingParams(temperature=0.0, logit_bias={8: 99.0}),
    ]
    rows = [sequence(each, [1, 2]) for each in alone]
    assert tokens_of(logits, rows) == [tokens_of(logits[i : i + 1], [rows[i]])[0] for i in range(3)]


def test_rows_of_nan_have_no_token() -> None:
    logits = torch.full((2, 64), float("nan"))
    found = tokens_of(
        logits, [sequence(SamplingParams(temperature=0.0), [1]), sequence(SamplingParams(top_p=0.5), [1])]
    )
    assert found == [-1, -1]


def any_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7]), top_p=rng.choice([1.0, 0.8]), top_k=rng.choice([-1, 20]),
        repetition_penalty=rng.choice([1.0, 1.3]), presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.2]), min_tokens=rng.randint(0, 4), stop_token_ids=(3,),
        logprobs=rng.choice([None, 2]),
    )  # fmt: skip


def tensors_of(plan: object) -> list[torch.Tensor]:
    if isinstance(plan, torch.Tensor):
        return [plan]
    return (
        [each for field in fields(plan) for each in tensors_of(getattr(plan, field.name))] if is_dataclass(plan) else []
    )


def test_a_plan_made_before_the_newest_tokens_are_known_is_the_one_made_after() -> None:
    """As where steps overlap: the tokens come from where the device keeps them."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    late = [
        sequence(
            any_params(rng), rng.choices(range(50), k=rng.randint(1, 9)), rng.choices(range(50), k=rng.randint(0, 4))
        )
        for _ in range(40)
    ]
    homes, newest = rng.sample(range(60), 40), torch.randint(0, 50, (60,))
    rows = [each.next_token(len(each.token_ids) + 1, home) for each, home in zip(late, homes, strict=True)]
    before = to_device(plan_sampling(rows, 50), torch.device("cpu"))
    early = with_last_tokens(before, newest)
    for each, home in zip(late, homes, strict=True):
        each.token_ids.append(int(newest[home]))
    after = plan_of(late, 50)
    assert early.logprobs.counts == after.logprobs.counts and early.draws.max_top_k == after.draws.max_top_k
    for ours, expected in zip(tensors_of(early), tensors_of(after), strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    logits = torch.randn(40, 50)
    assert torch.equal(sample(logits, early, KERNELS).token_ids, sample(logits, after, KERNELS).token_ids)
