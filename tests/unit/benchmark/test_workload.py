"""Workloads: published quantiles are hit, rates and ratios come out as asked, files are read, seeds repeat exactly.

Tolerances of what is drawn are six standard deviations or more.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.workload import RequestSpec, generate_requests
from sarathi.benchmark.workload.prompts import PromptMaker
from sarathi.benchmark.workload.shapes import SHAPES
from sarathi.benchmark.workload.sharing import PrefixRepetition, repeated_tokens

SEED = 0  # set anew for each test: see tests/conftest.py
KEEP_ALL = "--trace_request_length_generator.min_tokens=0"
WORKLOADS = {
    "fixed": ["--length_provider", "fixed"],
    "uniform": ["--length_provider", "uniform", "--interval_provider", "poisson"],
    "zipf": ["--length_provider", "zipf", "--zipf_request_length_generator.scramble", "--interval_provider", "gamma"],
    "arxiv": ["--length_provider", "trace", "--interval_provider", "poisson"],
}


def workload(*words: object, count: int = 200, seed: int | None = None) -> list[RequestSpec]:
    seed = SEED if seed is None else seed
    print(f"seed {seed}")
    words = (KEEP_ALL, *words, "--num_requests", count, "--seed", seed)
    return generate_requests(parse_options([str(word) for word in words]))


def prompts_of(specs: list[RequestSpec]) -> np.ndarray:
    return np.array([spec.num_prefill_tokens for spec in specs])


def outputs_of(specs: list[RequestSpec]) -> np.ndarray:
    return np.array([spec.num_decode_tokens for spec in specs])


@pytest.mark.parametrize("name", WORKLOADS)
def test_seeds_repeat_exactly(name: str) -> None:
    assert workload(*WORKLOADS[name]) == workload(*WORKLOADS[name])
    if name != "fixed":
        assert workload(*WORKLOADS[name]) != workload(*WORKLOADS[name], seed=SEED + 1)


def test_another_rate_leaves_the_lengths() -> None:
    slow, fast = (workload(*WORKLOADS["arxiv"], "--poisson_request_interval_generator_qps", qps) for qps in (1, 4))
    assert (prompts_of(slow) == prompts_of(fast)).all()
    assert slow[-1].arrived_at_s == pytest.approx(4 * fast[-1].arrived_at_s)


@pytest.mark.parametrize("count", [256, 20_000])
def test_arxiv_has_the_published_shape(count: int) -> None:
    specs = workload("--length_provider", "trace", count=count)
    prompt, output = prompts_of(specs), outputs_of(specs)
    for share, expected in ((0.1, 4781), (0.5, 7958), (0.9, 18490), (0.99, 26639)):
        assert np.quantile(prompt, share) == pytest.approx(expected, rel=0.03)
    for share, expected in ((0.1, 180), (0.5, 332), (0.9, 653)):
        assert np.quantile(output, share) == pytest.approx(expected, rel=0.03)
    assert np.quantile(output, 0.99) == pytest.approx(4053, rel=0.25 if count < 1000 else 0.06)
    assert prompt.mean() == pytest.approx(10041, rel=0.01)
    assert output.mean() == pytest.approx(471, rel=0.12 if count < 1000 else 0.03)
    assert prompt.min() >= 4096 and prompt.max() <= 31805
    assert prompt.max() == pytest.approx(31805, rel=0.2 if count < 1000 else 0.02)
    assert (prompt + output).max() <= 32768
    assert np.median(prompt / output) == pytest.approx(28, rel=0.15 if count < 1000 else 0.02)


@pytest.mark.parametrize(
    ("name", "low", "median", "high", "output_median"),
    [("arxiv_long_online", 22528, 27843, 47104, 318), ("arxiv_long_offline", 65536, 78967, 197632, 345)],
)
def test_long_traces_have_the_published_shape(name: str, low: int, median: int, high: int, output_median: int) -> None:
    prompt, output = SHAPES[name].sample(5000, np.random.default_rng(SEED))
    assert low <= prompt.min() and prompt.max() <= high
    assert np.median(prompt) == pytest.approx(median, rel=0.01)
    assert np.median(output) == pytest.approx(output_median, rel=0.01)


def test_as_many_of_a_shape_are_drawn_as_it_takes_to_keep_those_asked_for() -> None:
    words = ["--length_provider", "trace", "--trace_request_length_generator.min_tokens"]
    assert workload(*words, 0) == workload(*words, 4000) == workload(*words[:2])  # the shortest prompt has 4,096
    for low, count in ((7958, 300), (26639, 20)):
        specs = workload(*words, low, count=count)
        assert len(specs) == count and prompts_of(specs).min() > low
        assert specs == workload(*words, low, count=count) != workload(*words, low, count=count, seed=SEED + 1)
    assert np.quantile(prompts_of(workload(*words, 7958, count=2000)), 0.8) == pytest.approx(18490, rel=0.05)
    with pytest.raises(ValueError, match="'arxiv' has 0 requests of more than min_tokens, 40000 prompt tokens, and 5"):
        workload(*words, 40_000, count=5)


@pytest.mark.parametrize("seed", [957685268, None])  # the first one draws two prompts of one length
def test_long_requests_are_cut_in_proportion(seed: int | None) -> None:
    words = ["--length_provider", "trace", "--trace_request_length_generator.max_tokens"]
    free, cut = workload(*words, 32768, seed=seed), workload(*words, 6000, seed=seed)
    assert max(spec.num_tokens for spec in cut) in (5999, 6000) and min(spec.num_tokens for spec in cut) < 5990
    for whole, part in zip(free, cut, strict=True):
        kept = min(1, 6000 / whole.num_tokens)
        assert abs(part.num_prefill_tokens - kept * whole.num_prefill_tokens) <= 1
        assert abs(part.num_decode_tokens - kept * whole.num_decode_tokens) <= 1


def test_a_request_cut_to_the_limit_has_exactly_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n1,1000\n1,5000\n2,9000\n")
    section = "--trace_request_length_generator"
    words = ["--length_provider", "trace", f"{section}.trace_file", path, f"{section}.max_tokens", 1000]
    cut = workload(*words, count=3)
    assert [(spec.num_prefill_tokens, spec.num_decode_tokens) for spec in cut] == [(1, 999)] * 3


def test_times_may_have_more_digits_than_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text("arrival_time\n2023-11-16 18:15:46.6805900\n2023-11-16 18:15:50.9951690\n")
    section = "--trace_request_interval_generator"
    specs = workload("--interval_provider", "trace", f"{section}.trace_file", path, count=2)
    assert [spec.arrived_at_s for spec in specs] == [0.0, pytest.approx(4.314579, abs=1e-6)]


def test_uniform_totals_and_ratio() -> None:
    words = ["--length_provider", "uniform"]
    words += [
        f"--uniform_request_length_generator.{name}={value}"
        for name, value in (("min_tokens", 100), ("max_tokens", 900))
    ]
    specs = workload(*words, count=4000)
    totals = np.array([spec.num_tokens for spec in specs])
    assert totals.min() >= 100 and totals.max() <= 900
    assert totals.mean() == pytest.approx(500, rel=0.05)
    assert outputs_of(specs).tolist() == [-(-total // 21) for total in totals.tolist()]


def test_static_trace_of_the_paper() -> None:
    section = "--uniform_request_length_generator"
    words = [f"{section}.min_tokens=32768", f"{section}.max_tokens=32768", f"{section}.prefill_to_decode_ratio=500"]
    (spec,) = set(workload("--length_provider", "uniform", *words, count=50))
    assert (spec.arrived_at_s, spec.num_prefill_tokens, spec.num_decode_tokens) == (0.0, 32702, 66)


def test_zipf_prefers_short_ones_by_its_law() -> None:
    section = "--zipf_request_length_generator"
    words = ["--length_provider", "zipf", f"{section}.min_tokens=10", f"{section}.max_tokens=109", f"{section}.theta=1"]
    totals = np.array([spec.num_tokens for spec in workload(*words, count=40_000)])
    harmonic = sum(1 / n for n in range(1, 101))
    for rank in (1, 2, 5):
        assert (totals == 9 + rank).mean() == pytest.approx(1 / rank / harmonic, rel=0.2)


@pytest.mark.parametrize(("provider", "cv"), [("poisson", 1.0), ("gamma", 0.3), ("gamma", 2.5)])
def test_intervals_have_the_mean_and_spread_asked_for(provider: str, cv: float) -> None:
    words = ["--interval_provider", provider, f"--{provider}_request_interval_generator.qps", 5]
    words += ["--cv", cv] if provider == "gamma" else []
    gaps = np.diff([spec.arrived_at_s for spec in workload(*words, count=20_000)])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.15)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.15)


def test_lengths_of_a_csv_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(SEED)
    pairs = rng.integers(1, 5000, (30, 2)).tolist()
    lines = [f"{prompt}.0,{output},x" for prompt, output in pairs]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(["num_prefill_tokens,num_decode_tokens,other", *lines]) + "\n")
    words = ["--length_provider", "trace", "--trace_request_length_generator.trace_file", path]
    assert sorted([spec.num_prefill_tokens, spec.num_decode_tokens] for spec in workload(*words, count=30)) == sorted(
        pairs
    )
    more = workload(*words, count=65)
    assert more[30:60] == more[:30] and more[60:] == more[:5], "more requests than rows begin again"
    with pytest.raises(ValueError, match="has 0 of 30 requests of more than min_tokens, 5000 prompt tokens"):
        workload(*words, "--trace_request_length_generator.min_tokens=5000")


def test_replay_of_mooncake_keeps_times_and_shared_beginnings(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 5000, "input_length": 1200, "output_length": 7, "hash_ids": [1, 2, 3]},
        {"timestamp": 2000, "input_length": 1300, "output_length": 9, "hash_ids": [1, 2, 4]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = "--trace_request_generator"
    words = [
        "--request_generator.provider",
        "trace",
        f"{section}.trace_file",
        path,
        f"{section}.time_scale_factor",
        0.5,
    ]
    specs = workload(*words)
    assert [(s.arrived_at_s, s.num_prefill_tokens, s.num_decode_tokens) for s in specs] == [
        (0, 1300, 9),
        (1.5, 1200, 7),
    ]
    first, second = (PromptMaker(SEED, 1000).token_ids(spec, number) for number, spec in enumerate(specs))
    assert (len(first), len(second)) == (1300, 1200)
    assert first[: 2 * 512] == second[: 2 * 512]
    assert first[2 * 512 : 1200] != second[2 * 512 :]


def test_replay_of_both_csv_forms(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    ours.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n3,10,5\n4.5,20,6\n")
    theirs.write_text("Date,Time,PromptTokenCount,CompletionTokenCount\nmon,3,10,5\nmon,4.5,20,6\ntue,9,9,9\n")
    words = ["--request_generator.provider=trace", "--trace_request_generator.trace_file"]
    expected = [RequestSpec(0.0, 10, 5), RequestSpec(1.5, 20, 6)]
    assert workload(*words, ours) == workload(*words, theirs, "--date", "mon") == expected


def test_a_date_is_refused_where_a_trace_has_none(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1, "input_length": 4, "output_length": 4}')
    words = ["--request_generator.provider=trace", "--trace_request_generator.trace_file", path, "--date", "2023-08-21"]
    with pytest.raises(ValueError, match=r"trace_request_generator\.date is '2023-08-21': it must be none"):
        workload(*words)


def test_sharegpt_counts_tokens_by_the_tokenizer(tmp_path: Path) -> None:
    turns = [("a b c d e", "one two three four"), ("too short", "also")]
    content = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in turns]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(content))
    words = [KEEP_ALL, "--length_provider=trace", f"--trace_request_length_generator.trace_file={path}"]
    words += ["--num_requests=1"]
    config = parse_options(words)
    (spec,) = generate_requests(config, lambda text: len(text.split()))
    assert (spec.text, spec.num_prefill_tokens, spec.num_decode_tokens) == ("a b c d e", 5, 4)
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        generate_requests(config)


def test_interval_trace_takes_dates_and_a_window(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.csv"
    path.write_text("arrival_time\n" + "".join(f"1970-01-04 12:00:{second:02d}\n" for second in range(0, 60, 10)))
    section = "--trace_request_interval_generator"
    words = ["--interval_provider", "trace", f"{section}.trace_file", path, "--start_time", "1970-01-04 12:00:05"]
    words += [f"{section}.time_scale_factor", 0.1]
    assert [spec.arrived_at_s for spec in workload(*words, count=3)] == pytest.approx([0, 1, 2])
    with pytest.raises(ValueError, match="5 arrivals in its window, and 6"):
        workload(*words, count=6)


@pytest.mark.parametrize("text", ["", "nan", "soon"])
def test_what_is_no_time_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "arrivals.csv"
    path.write_text(f"name,arrival_time\na,1\nb,{text}\n")
    words = ["--interval_provider", "trace", "--trace_request_interval_generator.trace_file", path]
    with pytest.raises(ValueError, match=f"'{text}' is no time"):
        workload(*words, count=1)


@pytest.mark.parametrize("zone", ["", "Z", "+00:00"])
def test_times_may_name_their_zone(zone: str, tmp_path: Path) -> None:
    path = tmp_path / "arrivals.csv"
    rows = [f"2024-05-10 00:00:0{second}.500000{zone}\n" for second in range(3)]
    path.write_text("arrival_time\n" + "".join(rows), encoding="utf-8-sig")
    words = ["--interval_provider", "trace", "--trace_request_interval_generator.trace_file", path]
    arrivals = [spec.arrived_at_s for spec in workload(*words, "--start_time", "2024-05-10T00:00:01", count=2)]
    assert arrivals == pytest.approx([0, 1])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "num_prefill_tokens,num_decode_tokens\n1,1\n5\n", "row 2"),
        ("a.csv", "num_prefill_tokens,num_decode_tokens\n5,abc\n", "row 1.*'abc'"),
        ("a.csv", "num_prefill_tokens,num_decode_tokens\n5,inf\n", "row 1"),
        ("a.jsonl", "[1]\n", "row 1"),
        ("a.jsonl", '{"timestamp": null, "input_length": 4, "output_length": 4}', "row 1"),
        ("a.jsonl", '{"timestamp": NaN, "input_length": 4, "output_length": 4}', "nan is no time"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 4}', "it has no 'output_length'"),
        ("a.jsonl", '{"timest', "row 1"),
        ("a.json", '[{"conversations": [{"from": "human"}]}]', "row 1.*it has no 'value'"),
        ("a.json", '{"a": 1}', "holds a dict: it must hold a list of conversations"),
        ("a.json", "x", "is not JSON"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_the_row(name: str, content: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    words = ["--length_provider", "trace", "--trace_request_length_generator.trace_file", str(path)]
    with pytest.raises(ValueError, match=f"{path}.*{told}"):
        generate_requests(parse_options(words), len)


def test_a_mark_of_a_spreadsheet_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n5,6\n", encoding="utf-8-sig")
    (spec,) = workload("--length_provider", "trace", "--trace_request_length_generator.trace_file", path, count=1)
    assert (spec.num_prefill_tokens, spec.num_decode_tokens) == (5, 6)


def test_a_replay_of_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="it holds no request"):
        workload("--request_generator.provider=trace", "--trace_request_generator.trace_file", tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--length_provider=trace", "--trace_request_length_generator.trace_file=arxif"],
            "shapes are arxiv, arxiv_long",
        ),
        (
            ["--length_provider=uniform", "--uniform_request_length_generator.min_tokens=9000"],
            "must not exceed max_tokens",
        ),
        (["--interval_provider=trace"], "needs a file"),
        (["--request_generator.provider=trace"], "needs a file"),
        (["--cv=inf"], r"gamma_request_interval_generator\.cv is inf: it must be finite"),
        (["--trace_request_length_generator.prefill_scale_factor=inf"], "scale_factor is inf: it must be finite"),
    ],
)
def test_what_cannot_be_generated_says_why(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload(*words)


@pytest.mark.parametrize("provider", ["poisson", "gamma"])
def test_an_infinite_rate_is_all_at_once(provider: str) -> None:
    words = ["--interval_provider", provider, f"--{provider}_request_interval_generator.qps", "inf"]
    assert [spec.arrived_at_s for spec in workload(*words, count=3)] == [0, 0, 0]


def test_prompts_depend_on_seed_and_number_alone() -> None:
    spec = RequestSpec(0.0, 50, 1)
    ids = PromptMaker(SEED, 777).token_ids(spec, 3)
    assert ids == PromptMaker(SEED, 777).token_ids(spec, 3)
    assert ids != PromptMaker(SEED, 777).token_ids(spec, 4)
    assert ids != PromptMaker(SEED + 1, 777).token_ids(spec, 3)
    assert len(ids) == 50 and min(ids) >= 0 and max(ids) < 777


def brute_force(prompts: list[list[int]]) -> int:
    """Tokens of prompts that an earlier one begins with, but for the last one."""
    found = 0
    for number, prompt in enumerate(prompts):
        common = [
            next(
                (at for at, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b),
                min(len(prompt), len(other)),
            )
            for other in prompts[:number]
        ]
        found += min(max(common, default=0), len(prompt) - 1)
    return found


def random_blocks(rng: np.random.Generator) -> RequestSpec:
    blocks = tuple(rng.integers(0, 3, 4).tolist())
    return RequestSpec(0.0, int(rng.integers(25, 45)), 1, None, blocks, 8)


@pytest.mark.parametrize("kind", ["blocks", "repetition"])
def test_what_a_cache_without_limits_finds_is_what_prompts_have_in_common(kind: str) -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    some = [random_blocks(rng) for _ in range(40)]
    specs = some if kind == "blocks" else PrefixRepetition(3, 20, 5, 1).requests(10, rng)
    prompts = [PromptMaker(SEED, 2**31).token_ids(spec, number) for number, spec in enumerate(specs)]
    reuse = repeated_tokens(specs)
    assert reuse.num_prompt_tokens == sum(map(len, prompts))
    assert reuse.num_repeated == brute_force(prompts) > 100


def test_groups_are_of_one_size_but_for_one() -> None:
    words = ["--length_provider", "prefix_repetition", "--prefix_repetition_request_length_generator.num_prefixes", 4]
    specs = workload(*words, count=10)
    assert sorted(Counter(spec.block_ids for spec in specs).values()) == [2, 2, 3, 3]
    assert {(spec.num_prefill_tokens, spec.num_decode_tokens, spec.block_tokens) for spec in specs} == {(512, 128, 256)}


def test_conversations_arrive_at_their_first_turns() -> None:
    section = "--multi_turn_request_length_generator"
    words = ["--length_provider", "multi_turn", f"{section}.num_turns", 3, f"{section}.think_time", 2.5]
    specs = workload(*words, f"{section}.shared_len", 7, "--interval_provider", "poisson", count=8)
    assert [spec.conversation for spec in specs] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [spec.num_prefill_tokens for spec in specs] == [207, 557, 907, 207, 557, 907, 207, 557]
    times = [spec.arrived_at_s for spec in specs]
    assert times[1:3] == times[4:6] == [2.5, 2.5] and times[0] == 0 < times[3] < times[6]
    assert repeated_tokens(specs).num_repeated == 2 * (356 + 706) + 356 + 7 + 7
