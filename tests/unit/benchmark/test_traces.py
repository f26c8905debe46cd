"""Public traces in their own columns and units, as files come: packed, marked, broken. Values are written by hand."""

import gzip
import json
import logging
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sarathi.benchmark.config.options import parse_options
from sarathi.benchmark.serve.dataset import make_requests
from sarathi.benchmark.serve.options import add_options
from sarathi.benchmark.workload import RequestSpec, generate_requests
from sarathi.benchmark.workload.generate import read_arrivals
from sarathi.benchmark.workload.lengths import cut_to_fit, read_lengths
from sarathi.benchmark.workload.prompts import PromptMaker
from sarathi.benchmark.workload.text_files import seconds_of

SEED = 0  # set anew for each test: see tests/conftest.py
AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.5Z,2399,6\n"
)
BURST_GPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n118,GPT-4,417,276,693,API log\n"
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,1024,5\n0.25,2048,7\n"
BAILIAN = [
    {"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 33, "output_length": 132,
     "type": "text", "turn": 1, "hash_ids": [0, 1, 2]},
    {"chat_id": 160, "parent_chat_id": 159, "timestamp": 62.5, "input_length": 20, "output_length": 80,
     "type": "text", "turn": 2, "hash_ids": [0, 9]},
]  # fmt: skip


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def replayed(path: Path, *words: str) -> list[RequestSpec]:
    settings = ["--request_generator.provider=trace", f"--trace_request_generator.trace_file={path}", *words]
    return generate_requests(parse_options(settings))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (AZURE_2023, [(0, 374, 44), (4.314579, 396, 109)]),
        (AZURE_2024, [(0, 2162, 5), (0.49007, 2399, 6)]),
        (BURST_GPT, [(0, 472, 18), (113, 417, 276)]),
        (VIDUR, [(0, 1024, 5), (0.25, 2048, 7)]),
        ("Time,PromptTokenCount,CompletionTokenCount\n3,10,5\n4.5,20,6\n", [(0, 10, 5), (1.5, 20, 6)]),
    ],
    ids=["azure 2023", "azure 2024", "burstgpt", "vidur", "sarathi-serve"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_csv_traces(content: str, expected: list[tuple], packed: bool, tmp_path: Path) -> None:
    path = tmp_path / ("trace.csv.gz" if packed else "trace.csv")
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode("utf-8-sig"))
    found = [(spec.arrived_at_s, spec.num_prefill_tokens, spec.num_decode_tokens) for spec in replayed(path)]
    assert [each[1:] for each in found] == [each[1:] for each in expected]
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-6)
    assert [(spec.num_prefill_tokens, spec.num_decode_tokens) for spec in read_lengths(str(path))] == [
        each[1:] for each in expected
    ]


def test_failed_requests_of_burstgpt_are_counted(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(BURST_GPT)
    replayed(tmp_path / "a.csv")
    assert "1 of 3 rows are of another date or failed" in caplog.text


def test_bailian_counts_seconds_and_blocks_of_16(tmp_path: Path) -> None:
    path = tmp_path / "bailian.jsonl"
    path.write_text(lines(BAILIAN), encoding="utf-8-sig")
    specs = replayed(path)
    assert [spec.arrived_at_s for spec in specs] == [0, pytest.approx(1.386)]
    first, second = (PromptMaker(SEED, 1000).token_ids(spec, number) for number, spec in enumerate(specs))
    assert first[:16] == second[:16] and first[16:20] != second[16:]
    assert (len(first), len(second)) == (33, 20)


def test_blocks_of_neither_trace_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{**BAILIAN[0], "hash_ids": [1]}, {**BAILIAN[1], "hash_ids": [1, 2, 3, 4]}]))
    with pytest.raises(ValueError, match=r"row 1: 1 hash_ids for 33 tokens; .* neither of 16 tokens \(Qwen-Bailian\)"):
        read_arrivals(str(path))


def test_num_requests_and_max_tokens_cut_a_replay_and_say_so(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{i},{i + 1},5\n" for i in range(9)))
    specs = replayed(path, "--num_requests=6", "--trace_request_generator.max_tokens=8")
    assert [(spec.num_prefill_tokens, spec.num_decode_tokens) for spec in specs] == [
        (min(i, 3), 5) for i in range(1, 7)
    ]
    assert "cuts the replay to the first 6 of 9 requests" in caplog.text
    assert "prompts of 3 of 6 requests are cut to max_tokens 8" in caplog.text
    assert len(replayed(path)) == 9


def test_lengths_come_in_the_originals_order_cut_as_there(tmp_path: Path) -> None:
    """The original scales, cuts and filters a pandas frame and samples all of it with the seed as random_state."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    frame = pd.DataFrame(
        {"num_prefill_tokens": rng.integers(5, 9000, 200), "num_decode_tokens": rng.integers(5, 900, 200)}
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    total = frame.sum(axis=1)
    excess = (total - 4096).clip(lower=0)
    shares = frame.div(total, axis=0).mul(excess, axis=0)
    expected = (frame - np.ceil(shares).astype(int)).clip(lower=1)
    expected = expected[expected.num_prefill_tokens > 128].sample(frac=1, random_state=SEED)
    section = "--trace_request_length_generator"
    words = [f"{section}.trace_file={tmp_path / 'a.csv'}", f"{section}.max_tokens=4096", f"{section}.min_tokens=128"]
    specs = generate_requests(parse_options([*words, f"--num_requests={len(expected)}", f"--seed={SEED}"]))
    assert [[spec.num_prefill_tokens, spec.num_decode_tokens] for spec in specs] == expected.values.tolist()


def test_no_cut_leaves_more_than_the_limit() -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    for _ in range(3000):
        prompt, output, limit = int(rng.integers(1, 50)), int(rng.integers(1, 9000)), int(rng.integers(2, 3000))
        cut = cut_to_fit(prompt, output, limit)
        assert min(cut) >= 1 and (
            sum(cut) in (limit, limit - 1) if prompt + output > limit else cut == (prompt, output)
        )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5", 1.5), ("2023-11-16 18:15:46.6805900", 1700158546.68059), ("2023-11-16T18:15:46.5Z", 1700158546.5),
        ("2023-11-16 19:15:46+01:00", 1700158546.0), ("2023-11-16 18:15", 1700158500.0), ("1970-01-02", 86400.0),
        ("2023-11-16 18:15:46,25-0130", 1700163946.25),
    ],
)  # fmt: skip
def test_times_alike_on_every_python(text: str, expected: float) -> None:
    assert seconds_of(text) == pytest.approx(expected, abs=1e-6)


HEAD = "num_prefill_tokens,num_decode_tokens\n"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", HEAD.encode() + b"1,1\n2,\xff\n", "line 3: byte 0xff is not UTF-8"),
        ("a.csv", (HEAD + "1,1\n").encode("utf-16"), "is UTF-16: it must be UTF-8"),
        ("a.csv", (HEAD + "1,1\n0,4\n").encode(), "row 2.*num_prefill_tokens is '0': it must be a whole number"),
        ("a.csv", (HEAD + "1,-4\n").encode(), "row 1.*num_decode_tokens is '-4'"),
        ("a.csv", (HEAD + "1.5,4\n").encode(), "row 1.*num_prefill_tokens is '1.5'"),
        ("a.jsonl", lines([{**BAILIAN[0], "hash_ids": ["a", "b", "c"]}]).encode(), "row 1.*list of integers"),
        ("a.jsonl", lines([BAILIAN[0], {**BAILIAN[1], "output_length": 0}]).encode(), "row 2.*output_length is 0"),
        ("a.json", b'[{"conversations": [{"value": "a"}, {"value": 5}]}]', "row 1.*must be text"),
        ("a.csv.gz", gzip.compress(b"num", mtime=0)[:-4], "cannot be unpacked as gzip"),
    ],
)
def test_broken_files_are_refused_in_both_commands(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    words = ["--length_provider=trace", f"--trace_request_length_generator.trace_file={path}"]
    with pytest.raises(ValueError, match=f"{path}.*{told}"):
        generate_requests(parse_options(words), len)
    kind = {".jsonl": "mooncake", ".json": "sharegpt"}.get(path.suffix, "csv")
    with pytest.raises(ValueError, match=f"{path}.*{told}"):
        make_requests(served("--dataset-name", kind, "--dataset-path", str(path)))


def served(*words: str) -> Namespace:
    parser = ArgumentParser()
    add_options(parser)
    return parser.parse_args(["--num-prompts=1", *words])


def test_a_poem_makes_prompts_of_one_length_that_begin_alike(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.ERROR)
    path = tmp_path / "sonnet.txt"
    path.write_text("".join(f"a line of the poem number {number}\n" for number in range(100)))
    found = read_lengths(str(path), lambda text: len(text.split()), seed=3)
    assert {spec.num_decode_tokens for spec in found} == {150}
    assert {spec.num_prefill_tokens for spec in found} == {7 * round(550 / 7)}
    shared = {spec.text.split("\n")[28] for spec in found if spec.text}
    assert shared == {"a line of the poem number 28"} and len({spec.text for spec in found}) == len(found)
