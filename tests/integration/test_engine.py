"""The whole engine with a real model: text, streaming, sampling, chat, memory. Loads SmolLM2 once."""

import gc
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import save_tiny_config

from sarathi import LLM, SamplingParams
from sarathi.entrypoints.chat.conversation import Conversation
from sarathi.entrypoints.chat.local import LocalModel
from sarathi.entrypoints.demo import QUESTIONS, measure

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PARIS = "The capital of France is"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    torch.set_num_threads(1)  # two threads wait for each other where the machine is shared
    with LLM("smollm2-135m", device="cpu", memory_bytes="512mb") as model:
        yield model


def text_of(llm: LLM, prompt: str | list[int], params: SamplingParams) -> str:
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text


def test_it_knows_the_capital_of_france(llm: LLM) -> None:
    assert text_of(llm, PARIS, GREEDY).startswith(" Paris.")
    [chat] = llm.chat([{"role": "user", "content": "What is the capital of France?"}], GREEDY, use_tqdm=False)
    assert chat.outputs[0].text == "The capital of France is Paris."
    assert (chat.outputs[0].finish_reason, chat.outputs[0].stop_reason) == ("stop", None)


def test_text_and_token_ids_mix_and_batched_equals_alone(llm: LLM) -> None:
    assert llm.tokenizer is not None
    prompts = [PARIS, llm.tokenizer.encode("Water boils at"), "世界上最高的山是", "def fibonacci(n):\n", [504]]
    together = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in together] == [text_of(llm, prompt, GREEDY) for prompt in prompts]
    assert [output.prompt is None for output in together] == [False, True, False, False, True]


def test_streamed_text_of_many_bytes_a_character_is_whole_at_every_step(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=16)
    for prompt in ("我喜欢吃苹果和", "Smile: 😀😃😄😁😆😅😂🤣"):
        outputs = [output.outputs[0] for output in llm.stream(prompt, params)]
        assert "".join(output.delta for output in outputs) == outputs[-1].text == decode(llm, outputs[-1].token_ids)
        assert not any("\ufffd" in output.text for output in outputs[:-1])
        assert any(not output.delta for output in outputs[:-1]), "no character was split, so nothing was shown here"


def test_half_a_character_at_the_end_is_shown_as_such(llm: LLM) -> None:
    assert llm.tokenizer is not None
    half = llm.tokenizer.encode("😀")[0]
    params = SamplingParams(temperature=0.0, max_tokens=3, logit_bias={half: 100.0})
    assert text_of(llm, "x", params) == decode(llm, [half] * 3)
    assert "\ufffd" in decode(llm, [half] * 3)


def decode(llm: LLM, token_ids: list[int]) -> str:
    assert llm.tokenizer is not None
    return llm.tokenizer.decode(token_ids)


def test_any_stop_string_cuts_the_same_text(llm: LLM) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole = text_of(llm, "Once upon a time", SamplingParams(temperature=0.0, max_tokens=16))
    for _ in range(3):
        start = rng.randrange(len(whole) - 6)
        stop = whole[start : start + rng.randint(1, 6)]  # words and pieces of words: tokens end anywhere in it
        params = SamplingParams(temperature=0.0, max_tokens=16, stop=[stop])
        [output] = llm.generate("Once upon a time", params, use_tqdm=False)[0].outputs
        assert (output.text, output.stop_reason) == (whole.partition(stop)[0], stop)


def test_seeds_repeat_and_n_answers_differ(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.2, seed=11, max_tokens=8)

    def texts() -> list[str]:
        return [output.text for output in llm.generate(PARIS, params, use_tqdm=False)[0].outputs]

    first = texts()
    assert first == texts() and len(set(first)) == 3


def test_logprobs_belong_to_the_tokens(llm: LLM) -> None:
    [output] = llm.generate(PARIS, SamplingParams(temperature=0.0, max_tokens=4, logprobs=2), use_tqdm=False)[0].outputs
    assert output.logprobs is not None and len(output.logprobs) == 4
    for token_id, entry in zip(output.token_ids, output.logprobs, strict=True):
        likelihoods = [each.logprob for each in entry.values()]
        assert next(iter(entry)) == token_id and len(entry) == 2  # greedy: the chosen one is the most likely one
        assert likelihoods == sorted(likelihoods, reverse=True) and likelihoods[0] <= 0
    assert (
        "".join(entry[token].decoded_token for token, entry in zip(output.token_ids, output.logprobs, strict=True))
        == output.text
    )


def test_a_stop_string_across_the_border_of_min_tokens_ends_the_output(llm: LLM) -> None:
    """The tokens are ' ', '5', ',', ' ', '6': vLLM searches back from the new text by the stop string's length."""
    for min_tokens in (2, 3, 4):
        params = SamplingParams(temperature=0.0, max_tokens=16, min_tokens=min_tokens, stop=["5, 6"])
        [output] = llm.generate("1, 2, 3, 4,", params, use_tqdm=False)[0].outputs
        assert (output.text, output.num_tokens, output.stop_reason) == (" ", 5, "5, 6")


def test_bad_words_and_allowed_tokens(llm: LLM) -> None:
    assert llm.tokenizer is not None
    assert "Paris" not in text_of(llm, PARIS, replace(GREEDY, bad_words=["Paris"]))
    assert "The answer is" in text_of(llm, PARIS, GREEDY)
    barred = text_of(llm, PARIS, replace(GREEDY, bad_words=["answer is"]))
    assert "answer is" not in barred and barred.startswith(" Paris.\n\nThe answer")
    allowed = llm.tokenizer.encode(" London is big", add_special_tokens=False)
    [output] = llm.generate(PARIS, replace(GREEDY, allowed_token_ids=allowed), use_tqdm=False)[0].outputs
    assert set(output.token_ids) <= set(allowed)


def test_a_logits_processor_sees_the_output_so_far(llm: LLM) -> None:
    seen: list[list[int]] = []

    def forbid_repeats(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        logits[output] = -torch.inf
        return logits

    params = replace(GREEDY, logits_processors=[forbid_repeats])
    plain, processed = llm.generate([PARIS, PARIS], [GREEDY, params], use_tqdm=False)
    token_ids = processed.outputs[0].token_ids
    assert seen == [token_ids[:count] for count in range(len(seen))]
    assert len(set(token_ids)) == len(token_ids) == 12 and len(set(plain.outputs[0].token_ids)) < 12


def test_special_tokens_are_shown_where_that_is_asked_for(llm: LLM) -> None:
    hello = [{"role": "user", "content": "What is the capital of France?"}]
    shown = replace(GREEDY, skip_special_tokens=False, include_stop_str_in_output=True)
    [output] = llm.chat(hello, shown, use_tqdm=False)
    assert output.outputs[0].text == "The capital of France is Paris.<|im_end|>"


def test_abort_frees_the_request_and_leaves_the_others(llm: LLM) -> None:
    engine = llm.engine
    for request_id in ("keep", "drop"):
        engine.add_request(request_id, PARIS, GREEDY)
    for _ in range(3):
        engine.step()
    last = engine.abort("drop")
    assert last is not None and last.outputs[0].finish_reason == "abort"
    kept = ""
    while engine.has_work:
        kept = next((output.outputs[0].text for output in engine.step()), kept)
    assert kept == text_of(llm, PARIS, GREEDY)
    assert llm.reset_prefix_cache()
    stats = llm.memory_stats()
    assert stats.mapped_bytes == stats.idle_bytes and stats.wasted_bytes == 0


def test_a_conversation_answers_refuses_and_goes_on(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(LocalModel(llm, SamplingParams(temperature=0.0, max_tokens=12)))
    conversation.handle_line("What is the capital of France?")
    shown = capsys.readouterr().out
    assert shown.startswith("The capital of France is Paris.\n[8 tokens, ")
    assert re.search(r"tokens/s, [1-9][0-9.]* MiB of KV cache mapped\]\n$", shown)
    conversation.handle_line("word " * 9000)
    assert re.search(r"longest sequence is 8192.*\n.*/reset makes room", capsys.readouterr().err)
    conversation.handle_line("And of Italy?")
    assert "Rome" in capsys.readouterr().out


def test_times_of_a_request_are_in_order(llm: LLM) -> None:
    times = llm.generate(PARIS, GREEDY, use_tqdm=False)[0].metrics
    order = [times.arrival_time_s, times.first_scheduled_time_s, times.first_token_time_s, times.finish_time_s]
    assert None not in order and order == sorted(order)  # type: ignore[type-var]


def test_megacache_maps_little_more_than_the_tokens_of_the_demo() -> None:
    with LLM(device="cpu", attention_backend="sdpa_vattn_megacache", memory_bytes="512mb") as llm:
        measured = measure(llm, 4)
    assert measured.is_tight, measured.arithmetic()
    assert measured.peak_bytes >= measured.own_bytes > 0
    assert len(measured.answers) == len(QUESTIONS) == 12 and all(
        len(answer.token_ids) == 4 for answer in measured.answers
    )


def shared_memory_bytes() -> int:
    """Resident pages of memory files, which is what the host device maps."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssShmem"].split()[0]) * 1024


@pytest.mark.parametrize("how", ["delete", "close"])
def test_deleting_or_closing_gives_the_memory_back(tmp_path: Path, how: str) -> None:
    model = save_tiny_config(tmp_path, hidden_size=256, num_attention_heads=4, num_key_value_heads=4)
    before = shared_memory_bytes()
    tiny = LLM(model, load_format="dummy", device="cpu", memory_bytes="64mb", max_num_seqs=32)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    tiny.generate([[number] * 120 for number in range(32)], params, use_tqdm=False)
    assert shared_memory_bytes() - before > 4 * 2**20
    if how == "close":
        tiny.close()
    else:
        del tiny
        gc.collect()
    assert shared_memory_bytes() - before < 2**20


DAEMON = """
import sys, threading
from sarathi import LLM, SamplingParams

llm = LLM(sys.argv[1], load_format="dummy", device="cpu", memory_bytes="16mb", max_num_seqs=4)
is_running = threading.Event()

def generate():
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    try:
        for number, _ in llm.stream_all([[1, 2, 3]] * 200, params):
            is_running.set()
    except RuntimeError as error:
        print(error)

threading.Thread(target=generate, daemon=True).start()
is_running.wait()
print("end of main")
"""


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_the_interpreter_can_end_while_a_daemon_thread_generates(tmp_path: Path, times: int) -> None:
    model = save_tiny_config(tmp_path)
    for _ in range(times):
        result = subprocess.run([sys.executable, "-c", DAEMON, model], capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("end of main\n")


def test_close_in_the_middle_of_another_threads_generate(tmp_path: Path) -> None:
    model = save_tiny_config(tmp_path)
    for _ in range(5):
        tiny, errors = LLM(model, load_format="dummy", device="cpu", memory_bytes="16mb", max_num_seqs=4), []
        is_running = threading.Event()

        def generate(tiny: LLM = tiny, errors: list[str] = errors, is_running: threading.Event = is_running) -> None:
            try:
                for _ in tiny.stream_all([[1, 2, 3]] * 100, SamplingParams(max_tokens=100, ignore_eos=True)):
                    is_running.set()
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=generate)
        thread.start()
        assert is_running.wait(60)
        tiny.close()
        thread.join(60)
        assert len(errors) == 1 and "the LLM was closed" in errors[0]
