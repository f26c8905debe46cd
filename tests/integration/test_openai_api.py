"""OpenAI's API over a real server with SmolLM2, through OpenAI's own client and as raw HTTP."""

import json
import re
from collections.abc import Iterator

import httpx
import openai
import pytest
from http_server import RunningServer

from sarathi import LLM, SamplingParams

MODEL = "smollm2-135m"
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name a colour."}]
CHAT = {"model": MODEL, "messages": MESSAGES}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, max_model_len=1024, device="cpu", memory_bytes="64mb") as llm:
        yield llm


def post(server: RunningServer, path: str, **body: object) -> httpx.Response:
    return server.post(path, json=body)


def events(text: str) -> list[dict]:
    *chunks, done = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_completions_of_text_ids_and_lists_equal_generate(client: openai.OpenAI, llm: LLM) -> None:
    ids = llm.tokenizer.encode("Once upon a time")
    params = SamplingParams(temperature=0, max_tokens=12)
    first, second = (each.outputs[0].text for each in llm.generate([PROMPT, ids], params))
    for prompt, texts in ((PROMPT, [first]), (ids, [second]), ([PROMPT, "Once upon a time"], [first, second])):
        done = client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
        assert [each.text for each in done.choices] == texts
        assert [each.finish_reason for each in done.choices] == ["length"] * len(texts)
        assert done.usage.completion_tokens == 12 * len(texts)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_logprobs_are_those_of_generate(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    [output] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=2))
    done = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, temperature=0, echo=True, logprobs=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in done] if stream else done.choices
    assert "".join(each.text for each in choices) == PROMPT + output.outputs[0].text
    tokens = [token for each in choices for token in each.logprobs.tokens]
    offsets = [offset for each in choices for offset in each.logprobs.text_offset]
    text = PROMPT + output.outputs[0].text
    assert all(text[at:].startswith(token) for at, token in zip(offsets, tokens, strict=True))
    got = [value for each in choices for value in each.logprobs.token_logprobs]
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    ids = [*output.prompt_token_ids[1:], *output.outputs[0].token_ids]
    assert got[0] is None
    assert got[1:] == pytest.approx([entry[key].logprob for entry, key in zip(entries, ids, strict=True)], abs=1e-4)


def test_an_echo_without_new_tokens_is_the_prompt(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    assert done.choices[0].text == PROMPT and done.usage.completion_tokens == 0
    assert len(done.choices[0].logprobs.tokens) == done.usage.prompt_tokens


@pytest.mark.parametrize("content", ["Name a colour.", [{"type": "text", "text": "Name a colour."}]])
def test_chat_equals_chat_of_llm_streamed_or_not(client: openai.OpenAI, llm: LLM, content: object) -> None:
    [output] = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=20))
    asked = {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == output.outputs[0].text
    assert whole.usage.prompt_tokens == len(output.prompt_token_ids)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == output.outputs[0].text
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_logprobs_hold_bytes_and_the_most_likely(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = done.choices[0].logprobs.content
    assert len(content) == 5
    for each in content:
        assert bytes(each.bytes).decode() == each.token and len(each.top_logprobs) == 3
        assert each.top_logprobs[0].token == each.token  # greedy


def test_usage_comes_last_and_in_every_chunk_where_asked(server: RunningServer) -> None:
    shared = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
    plain = events(post(server, "/v1/completions", **shared).text)
    assert all(chunk["choices"] and "usage" not in chunk for chunk in plain)
    usage = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(post(server, "/v1/completions", **shared, stream_options=usage).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 3 + 5


def test_n_choices_stream_side_by_side(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=6, n=3, seed=1, stream=True)
    texts, ends = ["", "", ""], []
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content
        ends += [choice.index] if choice.finish_reason else []
    assert sorted(ends) == [0, 1, 2] and len(set(texts)) > 1


def test_stop_strings_and_their_reason(server: RunningServer, llm: LLM) -> None:
    [output] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    stop = output.outputs[0].text[5:8]
    done = post(server, "/v1/completions", prompt=PROMPT, max_tokens=12, temperature=0, stop=[stop]).json()
    [choice] = done["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == output.outputs[0].text.partition(stop)[0]


def test_tokenize_and_detokenize(server: RunningServer, llm: LLM) -> None:
    got = post(server, "/tokenize", prompt="Grüße, 世界!", return_token_strs=True).json()
    assert got["tokens"] == llm.tokenizer.encode("Grüße, 世界!")
    assert (got["count"], got["max_model_len"], len(got["token_strs"])) == (len(got["tokens"]), 1024, got["count"])
    assert post(server, "/detokenize", tokens=got["tokens"]).json() == {"prompt": "Grüße, 世界!"}
    assert post(server, "/tokenize", messages=MESSAGES).json()["tokens"] == llm.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        (
            "completions",
            {"prompt": "a", "max_tokens": "5"},
            400,
            "max_tokens",
            "max_tokens is '5': it should",
        ),
        ("completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "it should be a valid integer"),
        ("completions", {"prompt": {"a": 1}}, 400, "prompt", "it should be a valid string"),
        ("completions", {"prompt": [1, 1.5]}, 400, "prompt", "1.5 in it should be a valid integer"),
        (
            "completions",
            {"prompt": "a", "logit_bias": {"5": "x"}},
            400,
            "logit_bias",
            "'x' in it should be a valid number",
        ),
        ("completions", {"prompt": []}, 400, "prompt", "at least one prompt"),
        ("completions", {"max_tokens": 5}, 400, "prompt", "prompt is missing"),
        (
            "completions",
            {"prompt": "a", "stream": True, "stream_options": {"include_usage": 3}},
            400,
            "stream_options",
            "3 in it should be a valid boolean",
        ),
        ("completions", {"prompt": "a", "best_of": 3}, 400, "best_of", "best_of is 3"),
        ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix", "suffix is given"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "temperature is -1"),
        ("completions", {"prompt": [49152]}, 400, "prompt", "token id 49152"),
        ("completions", {"prompt": "a", "model": "other"}, 404, "model", "does not exist"),
        ("chat/completions", {"model": MODEL, "messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", {"model": MODEL, "messages": [{"role": "user"}]}, 400, None, "message 0 must be"),
        (
            "chat/completions",
            {"model": MODEL, "messages": MESSAGES, "top_logprobs": 2},
            400,
            "top_logprobs",
            "needs logprobs",
        ),
        (
            "chat/completions",
            {"model": MODEL, "messages": MESSAGES, "stream_options": {}},
            400,
            "stream_options",
            "needs stream",
        ),
    ],
)
def test_errors_are_in_openais_form(server: RunningServer, path: str, body, status, param, message: str) -> None:
    answer = post(server, f"/v1/{path}", **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and message in error["message"]
    assert error["type"] == "invalid_request_error" and error.keys() == {"message", "type", "param", "code"}


def test_a_prompt_that_is_too_long_has_a_code_of_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is 1024 tokens\. However") as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 1200}])
    assert caught.value.code == "context_length_exceeded"


def test_null_and_unknown_fields_are_tolerated(server: RunningServer) -> None:
    unknown = {"stop": None, "logprobs": None, "ignore_eos": True, "repetition_penalty": 1.0, "no_such_field": [1]}
    assert post(server, "/v1/completions", prompt="a", max_tokens=1, **unknown).status_code == 200


def test_broken_json_and_unknown_routes(server: RunningServer) -> None:
    broken = server.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 400 and "is not JSON" in broken.json()["error"]["message"]
    assert server.get("/v1/nothing").json()["error"]["message"] == "there is no route /v1/nothing"
    assert server.get("/v1/completions").status_code == 405


def test_routes_about_the_server(server: RunningServer, client: openai.OpenAI) -> None:
    for path in ("/health", "/ping", "/ready", "/version", "/load", "/docs", "/openapi.json"):
        assert server.get(path).status_code == 200, path
    [model] = client.models.list().data
    assert (model.id, model.root, model.max_model_len) == (MODEL, MODEL, 1024)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_metrics_count_what_was_served(server: RunningServer) -> None:
    def value(name: str) -> float:
        text = server.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith(f"sarathi:{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = {name: value(name) for name in ("prompt_tokens_total", "generation_tokens_total")}
    post(server, "/v1/completions", prompt=[1, 2, 3], max_tokens=4, ignore_eos=True)
    assert value("prompt_tokens_total") - before["prompt_tokens_total"] == 3
    assert value("generation_tokens_total") - before["generation_tokens_total"] == 4
    assert value("num_requests_running") == 0
    assert value("time_to_first_token_seconds_count") == value("request_queue_time_seconds_count") > 0


def test_the_web_page_has_no_external_parts(server: RunningServer) -> None:
    page = server.get("/")
    assert (
        page.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in page.headers["content-security-policy"]
    )
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page.text)
    asked = set(re.findall(r'fetch\("([^"]+)"', page.text))
    assert asked == {"v1/chat/completions", "stats"}
    fields = re.search(r"JSON.stringify\(\{(\w+), (\w+), stream: true, max_tokens: 1024, temperature", page.text)
    assert fields and set(fields.groups()) == {"model", "messages"}
    stats = server.get("/stats").json()
    shown = set(re.findall(r"stats\.(\w+)", page.text))
    assert shown == stats.keys() and stats["model"] == MODEL and stats["total_rows"] > 0
