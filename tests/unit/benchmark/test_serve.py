"""The load generator against a real HTTP server on loopback, and its arithmetic against values made by hand."""

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_server import Behaviour, serving
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from sarathi.benchmark.serve import results
from sarathi.benchmark.serve.client import RequestResult
from sarathi.benchmark.serve.dataset import make_requests
from sarathi.benchmark.serve.main import main
from sarathi.benchmark.serve.options import add_options
from sarathi.benchmark.serve.vocabulary import load_vocabulary

LIMIT_S = 60  # of what a busy machine may delay
SEED = 0  # set anew for each test: see tests/conftest.py


def load(behaviour: Behaviour, folder: Path, *words: object, code: int = 0) -> dict:
    """The JSON result of one load."""
    print(f"seed {SEED}")
    common = ["--base-url", behaviour.url, "--disable-tqdm", "--save-detailed", "--seed", SEED]
    common += ["--result-dir", folder, "--result-filename", "r.json"]
    assert main([str(word) for word in (*common, *words)]) == code
    return json.loads((folder / "r.json").read_text())


def test_latencies_are_those_of_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(first_s=0.1, gap_s=0.03)) as server:
        result = load(server, tmp_path, "--num-prompts", 4, "--random-input-len", 30, "--random-output-len", 6)
    assert (result["completed"], result["failed"], result["model_id"]) == (4, 0, "fake-model")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (120, 24)
    ttfts, decodes = np.array(result["ttfts"]), np.sum(result["itls"], axis=1)  # a late chunk shortens the next gap
    assert ttfts.min() >= 0.099 and (ttfts + decodes).min() >= 0.249 and result["p99_e2el_ms"] < LIMIT_S * 1e3
    assert result["median_ttft_ms"] == pytest.approx(1e3 * np.median(ttfts))
    assert result["median_itl_ms"] == pytest.approx(1e3 * np.median(result["itls"]))
    assert result["median_tpot_ms"] == pytest.approx(1e3 * np.median(decodes / 5))
    assert result["median_e2el_ms"] == pytest.approx(1e3 * np.median(ttfts + decodes))
    assert result["output_throughput"] == pytest.approx(24 / result["duration"])
    assert result["generated_texts"] == ["t0 t1 t2 t3 t4 t5 "] * 4
    printed = capsys.readouterr().out
    for line in ("Serving Benchmark Result", "Mean TTFT (ms)", "P99 TPOT (ms)", "Median ITL (ms)", "P99 E2EL (ms)"):
        assert line in printed


def test_request_is_what_servers_expect(tmp_path: Path) -> None:
    words = ["--num-prompts", 3, "--random-input-len", 20, "--random-output-len", 2, "--ignore-eos", "--api-key", "k"]
    words += ["--extra-body", '{"top_k": 5}', "--header", "X-Test=1", "--vocab-size", 50, "--random-prefix-len", 4]
    with serving(Behaviour()) as server:
        load(server, tmp_path, *words)
    for body, headers in zip(server.bodies, server.headers, strict=True):
        assert (body["model"], body["stream"], body["ignore_eos"], body["top_k"]) == ("fake-model", True, True, 5)
        assert body["stream_options"] == {"include_usage": True} and body["max_tokens"] == 2
        assert len(body["prompt"]) == 24 and max(body["prompt"]) < 50
        assert (headers["Authorization"], headers["X-Test"]) == ("Bearer k", "1")
    assert len({tuple(body["prompt"][:4]) for body in server.bodies}) == 1
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 3


SENTENCES = ["over hills and under rivers\nand over under", "hills and\nrivers over"]


def save_tokenizer(folder: Path, sentences: list[str] = SENTENCES) -> Tokenizer:
    """Bytes, the sentences' words, and a token before each prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return tokenizer


def test_prompts_of_a_tokenizer_are_text_of_exact_lengths(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    words = ["--num-prompts", 3, "--random-input-len", 20, "--random-output-len", 2, "--random-prefix-len", 4]
    words += ["--tokenizer", tmp_path / "tokenizer"]
    with serving(Behaviour(text_only=True, usage=False)) as server:
        result = load(server, tmp_path, *words)
        load(server, tmp_path, *words, "--backend", "openai-chat")
    prompts = [body["prompt"] for body in server.bodies[:3]]
    assert [len(tokenizer.encode(prompt)) for prompt in prompts] == result["input_lens"] == [24, 24, 24]
    assert len({tuple(prompt.split()[:4]) for prompt in prompts}) == 1 and len(set(prompts)) == 3
    messages = [body["messages"][0]["content"][0]["text"] for body in server.bodies[3:]]
    assert [len(tokenizer.encode(text, add_special_tokens=False)) for text in messages] == [24, 24, 24]
    assert result["tokenizer_id"] == str(tmp_path / "tokenizer")


def test_a_tokenizer_without_whole_words_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(tmp_path / "bytes", [])
    assert main(["--tokenizer", str(tmp_path / "bytes"), "--num-prompts", "1"]) == 1
    assert "no word is a single token" in capsys.readouterr().err


def test_answers_that_refuse_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num-prompts", 2, "--random-input-len", 20, "--random-output-len", 2]
    with serving(Behaviour(text_only=True)) as server:
        assert load(server, tmp_path, *words, code=1)["failed"] == 2
    assert "a prompt must be text" in capsys.readouterr().err


def test_sharegpt_is_counted_by_the_tokenizer(tmp_path: Path) -> None:
    tokenizer, path = save_tokenizer(tmp_path / "tokenizer"), tmp_path / "talk.json"
    turns = ["over hills, and then?", "under rivers and over"]
    path.write_text(json.dumps([{"conversations": [{"value": turn} for turn in turns]}]))
    words = ["--dataset-name", "sharegpt", "--dataset-path", path, "--num-prompts", 1]
    with serving(Behaviour(usage=False)) as server:
        result = load(server, tmp_path, *words, "--tokenizer", tmp_path / "tokenizer")
    counts = [len(tokenizer.encode(turn, add_special_tokens=False)) for turn in turns]
    assert (result["input_lens"], server.bodies[0]["max_tokens"]) == ([counts[0]], counts[1])
    assert server.bodies[0]["prompt"] == turns[0]


def talks(path: Path, *lengths: tuple[int, int]) -> Path:
    """Conversations of so many tokens in question and answer, by the estimate; question i begins with i."""
    turns = [(f"{number} ".ljust(4 * prompt, "x"), "y" * 4 * output) for number, (prompt, output) in enumerate(lengths)]
    path.write_text(json.dumps([{"conversations": [{"value": turn} for turn in pair]} for pair in turns]))
    return path


def chosen(path: Path, count: int, *words: object) -> list[int]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = ["--dataset-name", "sharegpt", "--dataset-path", path, "--num-prompts", count, *words]
    requests, _ = make_requests(parser.parse_args([str(word) for word in options]))
    return [int(str(request.prompt).split()[0]) for request in requests]


def test_the_seed_draws_conversations(tmp_path: Path) -> None:
    path = talks(tmp_path / "talks.json", *[(8, 8)] * 100)
    first, other = chosen(path, 20, "--seed", 1), chosen(path, 20, "--seed", 2)
    assert first == chosen(path, 20, "--seed", 1) and len(set(first)) == 20
    assert first != other and first != sorted(first)
    assert chosen(path, 20, "--disable-shuffle") == list(range(20))


def test_long_conversations_are_no_chats(tmp_path: Path) -> None:
    path = talks(tmp_path / "talks.json", (1024, 1024), (1025, 4), (8, 2041), (8, 2040), (3, 8))
    assert sorted(chosen(path, 2)) == [0, 3]
    assert sorted(chosen(path, 3, "--sharegpt-output-len", 100)) == [0, 2, 3]
    with pytest.raises(ValueError, match=r"--num-prompts is 3, but .*talks\.json' has 2 requests"):
        chosen(path, 3)


def test_chat_counts_the_tokens_of_the_server(tmp_path: Path) -> None:
    words = ["--backend", "openai-chat", "--num-prompts", 2, "--random-input-len", 10, "--random-output-len", 3]
    with serving(Behaviour()) as server:
        result = load(server, tmp_path, *words)
    assert result["input_lens"] == [20, 20]
    assert server.bodies[0]["messages"][0]["content"][0]["type"] == "text"
    assert server.bodies[0]["max_completion_tokens"] == 3


def test_chunks_are_counted_where_the_server_counts_nothing(tmp_path: Path) -> None:
    with serving(Behaviour(usage=False)) as server:
        result = load(server, tmp_path, "--num-prompts", 2, "--random-input-len", 9, "--random-output-len", 4)
    assert (result["output_lens"], result["input_lens"]) == ([4, 4], [9, 9])


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
@pytest.mark.parametrize("usage", [True, False])
def test_chunks_that_open_or_close_an_answer_are_no_tokens(tmp_path: Path, backend: str, usage: bool) -> None:
    words = ["--backend", backend, "--num-prompts", 2, "--random-input-len", 9, "--random-output-len", 5]
    with serving(Behaviour(first_s=0.1, frames=True, usage=usage)) as server:
        result = load(server, tmp_path, *words)
    assert min(result["ttfts"]) >= 0.1
    assert [len(gaps) for gaps in result["itls"]] == [4, 4]
    assert result["output_lens"] == [5, 5] and result["max_output_tokens_per_s"] <= 10


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_an_end_without_text_is_a_token_where_the_server_counts_it(tmp_path: Path, backend: str) -> None:
    words = ["--backend", backend, "--num-prompts", 2, "--random-input-len", 9]
    with serving(Behaviour(frames=True, silent_end=True)) as server:
        several = load(server, tmp_path, *words, "--random-output-len", 4)
        single = load(server, tmp_path, *words, "--random-output-len", 1)
    assert (several["output_lens"], [len(gaps) for gaps in several["itls"]]) == ([4, 4], [3, 3])
    assert (single["completed"], single["output_lens"], single["itls"]) == (2, [1, 1], [[], []])


def test_failures_are_counted_told_and_in_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(trouble={1: "500", 3: "error"})) as server:
        words = ["--num-prompts", 6, "--random-input-len", 9, "--random-output-len", 4]
        result = load(server, tmp_path, *words, "--max-concurrency", 1, code=1)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (4, 2, 16)
    assert result["errors"][0] == "" and "HTTP 500" in result["errors"][1] and result["errors"][3] == "lost my mind"
    assert "lost my mind" in capsys.readouterr().err


def test_an_answer_that_is_cut_off_is_a_failure(tmp_path: Path) -> None:
    words = ["--num-prompts", 2, "--random-input-len", 9, "--random-output-len", 4, "--max-concurrency", 1]
    with serving(Behaviour(trouble={1: "cut"})) as server:
        result = load(server, tmp_path, *words, code=1)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (1, 1, 4)
    assert result["errors"] == ["", "the stream ended before the answer did"]


def test_a_connection_that_the_server_closes_fails_no_request(tmp_path: Path) -> None:
    words = ["--num-prompts", 6, "--random-input-len", 9, "--random-output-len", 2, "--max-concurrency", 1]
    with serving(Behaviour(hangs_up=True)) as server:
        assert load(server, tmp_path, *words)["completed"] == 6


def test_a_server_that_dies_leaves_what_succeeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num-prompts", 9, "--random-input-len", 9, "--random-output-len", 4, "--max-concurrency", 2]
    with serving(Behaviour(trouble={4: "kill"})) as server:
        result = load(server, tmp_path, *words, code=1)
    assert 3 <= result["completed"] <= 4 and result["completed"] + result["failed"] == 9
    assert result["total_output_tokens"] == 4 * result["completed"]
    assert [error == "" for error in result["errors"]].count(True) == result["completed"]
    assert "Cannot connect" in capsys.readouterr().err


def test_model_is_the_first_listed_and_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num-prompts", "1", "--random-output-len", "1", "--disable-tqdm"]
    with serving(Behaviour(models=("/models/some.gguf", "other"))) as server:
        assert main(["--base-url", server.url, *words, "--save-result", "--result-dir", str(tmp_path)]) == 0
        assert server.bodies[0]["model"] == "/models/some.gguf"
        server.models = ()
        assert main(["--base-url", server.url, *words]) == 1
    assert [path.name.split("-2")[0] for path in tmp_path.iterdir()] == ["openai-infqps-some.gguf"]
    assert "lists no model: set --model" in capsys.readouterr().err


def test_a_server_that_hangs_is_a_failure_and_not_a_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num-prompts", 2, "--random-input-len", 5, "--random-output-len", 2, "--request-timeout", 0.3]
    with serving(Behaviour(first_s=20)) as server:
        result = load(server, tmp_path, *words, code=1)
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 2, 0)
    assert "Timeout" in capsys.readouterr().err


def test_concurrency_stays_below_its_limit(tmp_path: Path) -> None:
    words = ["--num-prompts", 9, "--random-input-len", 5, "--random-output-len", 3, "--max-concurrency", 2]
    with serving(Behaviour()) as server:
        result = load(server, tmp_path, *words)
    assert server.peak_running == 2
    assert result["max_concurrent_requests"] == 2


def test_rate_spreads_requests_over_time(tmp_path: Path) -> None:
    words = ["--num-prompts", 20, "--random-input-len", 5, "--random-output-len", 1, "--request-rate", 50]
    with serving(Behaviour(first_s=0.001)) as server:
        result = load(server, tmp_path, *words, "--burstiness", 100)
        even = load(server, tmp_path, *words, "--burstiness", "inf")
    assert 0.25 < result["duration"] < LIMIT_S  # 19 intervals of 20 ms, nearly even
    assert 0.38 < even["duration"] < LIMIT_S and even["burstiness"] == "inf"


def test_warm_ups_are_forgotten(tmp_path: Path) -> None:
    words = ["--num-prompts", 3, "--random-input-len", 5, "--random-output-len", 1, "--num-warmups", 4]
    with serving(Behaviour()) as server:
        assert load(server, tmp_path, *words)["completed"] == 3
    prompts = [body["prompt"] for body in server.bodies]
    assert len(prompts) == 7 and prompts[:4] == [prompts[0]] * 4
    assert len({tuple(prompt) for prompt in prompts}) == 3  # a server that remembers prompts knows one of them


def test_an_interrupt_keeps_what_was_answered_over_the_time_of_the_load(tmp_path: Path) -> None:
    """Three requests warm up, two are answered, and ^C comes when the server has the next one, which it never answers.

    The load begins behind the last warm-up and before its own first request, by the server's times.
    """
    words = ["--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "2", "--max-concurrency", "1"]
    words += ["--num-warmups", "3", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    with serving(Behaviour(first_s=0.3, trouble={5: "hang"})) as server:
        command = [sys.executable, "-m", "sarathi.benchmark.serve.main", "--base-url", server.url, *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background has it ignored
        )  # fmt: skip
        while len(server.arrived_at_s) < 6:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (2, 0, 4)
    *_, last_warm_up, first, _, hanging = server.arrived_at_s
    assert hanging - first <= result["duration"] <= time.perf_counter() - last_warm_up
    assert "Serving Benchmark Result" in printed


def test_more_connections_than_a_shell_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's connections are in this process too."""
    monkeypatch.setattr("sarathi.benchmark.serve.load.SPARE_FILES", 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = ["--num-prompts", 150, "--random-input-len", 5, "--random-output-len", 1]
    with serving(Behaviour(first_s=0.5)) as server:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
        try:
            assert load(server, tmp_path, *words)["completed"] == 150
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("words", [["--result-filename", "new/folder/r.json"], ["--metadata", "a=b", "c"]])
def test_what_would_lose_a_result_is_seen_before_the_load(words: list[str], tmp_path: Path) -> None:
    common = ["--num-prompts", "1", "--random-output-len", "1", "--disable-tqdm", "--save-result", "--result-dir"]
    with serving(Behaviour()) as server:
        code = main(["--base-url", server.url, *common, str(tmp_path / "results"), *words])
    assert (code, len(server.bodies)) in ((0, 1), (1, 0))
    assert code == 1 or (tmp_path / "results" / "new" / "folder" / "r.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metadata", "a=b", "mean_ttft_ms=3"], "--metadata sets 'mean_ttft_ms'"),
        (["--metadata", "date=today"], "--metadata sets 'date'"),
        (["--metadata", "errors=none"], "--metadata sets 'errors'"),
        (["--extra-body", '{"top_k": 5, "stream": false}'], "--extra-body sets 'stream'"),
        (["--extra-body", '{"stream_options": {}}'], "--extra-body sets 'stream_options'"),
        (["--extra-body", '{"top_p": 0.5}', "--top-p", "0.9"], "--extra-body sets 'top_p'"),
        (["--extra-body", '{"ignore_eos": false}', "--ignore-eos"], "--extra-body sets 'ignore_eos'"),
    ],
)
def test_keys_that_the_benchmark_sets_itself_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Behaviour()) as server:
        assert main(["--base-url", server.url, "--num-prompts", "1", "--disable-tqdm", *words]) == 1
    assert message in capsys.readouterr().err and server.bodies == []


def test_goodput_counts_requests_that_meet_every_target(tmp_path: Path) -> None:
    words = ["--num-prompts", 4, "--random-input-len", 5, "--random-output-len", 3]
    with serving(Behaviour(first_s=0.05)) as server:
        met = load(server, tmp_path, *words, "--goodput", "ttft:5000", "e2el:9000")
        missed = load(server, tmp_path, *words, "--goodput", "ttft:5000", "e2el:10")
    assert met["request_goodput"] == pytest.approx(met["request_throughput"])
    assert missed["request_goodput"] == 0


def test_same_seed_sends_the_same(tmp_path: Path) -> None:
    words = ["--num-prompts", 5, "--random-input-len", 40, "--random-output-len", 4, "--random-range-ratio", 0.5]
    prompts = []
    for _ in range(2):
        with serving(Behaviour(first_s=0, gap_s=0)) as server:
            result = load(server, tmp_path, *words, "--max-concurrency", 1)
        prompts.append([(body["prompt"], body["max_tokens"]) for body in server.bodies])
        assert all(20 <= length <= 60 for length in result["input_lens"])
    assert prompts[0] == prompts[1]


def test_mooncake_is_replayed_at_its_times(tmp_path: Path) -> None:
    rows = [{"timestamp": 100 * n, "input_length": 600, "output_length": 2, "hash_ids": [1, n]} for n in range(4)]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(Behaviour(first_s=0.001)) as server:
        result = load(server, tmp_path, "--dataset-name", "mooncake", "--dataset-path", path, "--num-prompts", 4)
    assert 0.3 <= result["duration"] < LIMIT_S
    assert len({tuple(body["prompt"][:512]) for body in server.bodies}) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--goodput", "speed:3"], "must be ttft, tpot or e2el"),
        (["--percentile-metrics", "ttft,x"], "'x' is not among"),
        (["--metric-percentiles", "101"], "0 to 100"),
        (["--dataset-name", "csv"], "needs --dataset-path"),
        (["--tokenizer", "/nowhere"], "--tokenizer '/nowhere' cannot be loaded"),
        (["--port", "1"], "is the server up?"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--num-prompts", "1", "--disable-tqdm"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "-1"], "argument --seed: -1 must be at least 0"),
        (["--num-warmups", "-1"], "argument --num-warmups: -1 must be at least 0"),
        (["--random-prefix-len", "-3"], "argument --random-prefix-len: -3 must be at least 0"),
        (["--extra-body", "[1]"], "'[1]' must be a JSON object"),
        (["--extra-body", "{"], "'{' is not JSON"),
    ],
)
def test_words_that_no_option_takes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


def result_of(sent_s: float, times_s: list[float], tokens: int) -> RequestResult:
    return RequestResult(sent_s, 10, tokens, times_s, times_s[-1])


def test_formulas_by_hand() -> None:
    made = [result_of(0.0, [1.0, 1.5, 2.5], 3), result_of(0.5, [0.75], 1), result_of(2.5, [3.0, 3.2], 5)]
    values = results.latencies_ms(made)
    assert values["ttft"] == [1000, 250, 500]
    assert values["tpot"] == pytest.approx([750, 50])  # (e2el - ttft) / (n - 1); one token alone has none
    assert values["itl"] == pytest.approx([500, 1000, 200])
    computed = results.compute(made, 4.0, {"ttft": 600, "tpot": 100})
    assert (computed["max_concurrent_requests"], computed["max_output_tokens_per_s"]) == (2, 5)
    assert computed["request_goodput"] == 2 / 4.0
    assert computed["total_token_throughput"] == (30 + 9) / 4.0
    found = results.statistics(values, ["itl"], [50, 99])
    assert found["p50_itl_ms"] == pytest.approx(500) and found["mean_itl_ms"] == pytest.approx(
        np.mean([500, 1000, 200])
    )
    assert set(found) == {"mean_itl_ms", "median_itl_ms", "std_itl_ms", "p50_itl_ms", "p99_itl_ms"}


def test_time_in_the_clients_queue_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One at a time of 0.1 s each, all due at once: the last waits for the three before it."""
    words = ["--num-prompts", 4, "--random-input-len", 20, "--random-output-len", 1, "--max-concurrency", 1]
    with serving(Behaviour(first_s=0.1)) as server:
        result = load(server, tmp_path, *words)
    queued, ttfts = np.array(result["queued"]), np.array(result["ttfts"])
    assert (queued >= 0.099 * np.arange(4)).all() and ttfts.min() >= 0.099
    assert ttfts.sum() <= result["duration"] < LIMIT_S  # they follow each other
    assert result["p99_scheduled_ttft_ms"] == pytest.approx(1e3 * np.percentile(queued + ttfts, 99))
    assert result["mean_scheduled_e2el_ms"] - result["mean_e2el_ms"] == pytest.approx(1e3 * np.mean(result["queued"]))
    assert "Mean SCHEDULED_TTFT (ms)" in capsys.readouterr().out


@pytest.mark.parametrize("usage", [True, False])
def test_without_usage_the_tokenizer_counts_answers(usage: bool, tmp_path: Path) -> None:
    """The server's chunks, "t0 ", are more than one token each to this tokenizer."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    words = ["--num-prompts", 2, "--random-input-len", 20, "--random-output-len", 5]
    words += ["--tokenizer", tmp_path / "tokenizer"]
    with serving(Behaviour(text_only=True, usage=usage)) as server:
        result = load(server, tmp_path, *words)
    counted = [len(tokenizer.encode(text, add_special_tokens=False)) for text in result["generated_texts"]]
    assert result["output_lens"] == ([5, 5] if usage else counted) and min(counted) > 5


def test_the_shipped_models_tokenizer_by_its_name() -> None:
    vocabulary = load_vocabulary("smollm2-135m")
    assert vocabulary.count(vocabulary.text(range(50))) == 50 and vocabulary.num_special_tokens == 0


def test_a_csv_with_times_is_replayed_at_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,8,2\n"
                                    "2024-05-10 00:00:00.300000,9,3\n2024-05-10 00:00:00.400000,7,1\n")  # fmt: skip
    words = ["--num-prompts", 3, "--dataset-name", "csv", "--dataset-path", tmp_path / "a.csv"]
    with serving(Behaviour()) as server:
        began_s = time.perf_counter()
        result = load(server, tmp_path, *words)
    delays_s = np.array(server.arrived_at_s) - began_s
    assert (delays_s >= (0, 0.3, 0.4)).all() and delays_s.max() < LIMIT_S
    assert result["planned_request_rate"] == pytest.approx(2 / 0.4) and result["request_rate"] == "inf"
    assert "Request rate planned (RPS):             5.00" in capsys.readouterr().out


def test_prefix_repetition_and_what_a_cache_would_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset-name", "prefix_repetition", "--num-prompts", 6, "--prefix-repetition-num-prefixes", 2]
    words += ["--prefix-repetition-prefix-len", 30, "--prefix-repetition-suffix-len", 10]
    words += ["--prefix-repetition-output-len", 2, "--vocab-size", 500]
    with serving(Behaviour()) as server:
        result = load(server, tmp_path, *words)
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert {len(prompt) for prompt in prompts} == {40} and len(set(prompts)) == 6
    assert len({prompt[:30] for prompt in prompts}) == 2 and {body["max_tokens"] for body in server.bodies} == {2}
    assert result["ideal_cache_hit_rate"] == pytest.approx(4 * 30 / (6 * 40)) and result["cache_hit_rate"] is None
    assert "with a cache without limits:        0.50" in capsys.readouterr().out


def test_turns_of_a_conversation_send_what_was_said_before(tmp_path: Path) -> None:
    words = [
        "--dataset-name",
        "multi_turn",
        "--num-prompts",
        5,
        "--multi-turn-num-turns",
        3,
        "--backend",
        "openai-chat",
    ]
    words += ["--multi-turn-user-len", 4, "--multi-turn-output-len", 2, "--multi-turn-think-time", 0.2]
    with serving(Behaviour(first_s=0.0, gap_s=0.0)) as server:
        result = load(server, tmp_path, *words)
    talks = [
        [(each["role"], each["content"][0]["text"]) for each in body["messages"]]
        for body in sorted(server.bodies, key=lambda body: len(body["messages"]))
    ]
    assert [len(talk) for talk in talks] == [1, 1, 3, 3, 5] and result["completed"] == 5
    for talk in talks[2:]:
        assert talk[:-2] in talks and talk[-2] == ("assistant", "t0 t1 ") and talk[-1][0] == "user"
    assert all(len(text.split()) == 4 for talk in talks for role, text in talk if role == "user")
    assert max(server.arrived_at_s) - min(server.arrived_at_s) >= 0.4
    prompts, found = (4, 4, 10, 10, 16), (0, 0, 5, 5, 11)
    assert result["ideal_cache_hit_rate"] == pytest.approx(sum(found) / sum(prompts))


def test_turns_of_completions_need_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dataset-name", "multi_turn", "--num-prompts", "2"]) == 1
    assert "needs --tokenizer or --backend openai-chat" in capsys.readouterr().err
