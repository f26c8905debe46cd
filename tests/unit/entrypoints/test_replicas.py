"""Several engines behind one address, without Ray: prefixes, affinity, the gateway over replicas that die, merging."""

import asyncio
import json
import random
import sys
from collections.abc import AsyncGenerator, Callable, Sequence

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from sarathi.config.load import load_config
from sarathi.config.scaling import ScalingConfig
from sarathi.config.server import ServerConfig
from sarathi.entrypoints.anthropic import ROUTERS
from sarathi.entrypoints.cli import main
from sarathi.entrypoints.replicas.affinity import PrefixAffinity
from sarathi.entrypoints.replicas.exchange import CURRENT, Exchange
from sarathi.entrypoints.replicas.gateway import Gateway, ReplicaLostError
from sarathi.entrypoints.replicas.merge import merge_metrics
from sarathi.entrypoints.replicas.messages import Begun, ForwardedRequest, Head, Piece, WholeAnswer
from sarathi.entrypoints.replicas.prefix import BLOCK_BYTES, response_prefix, routing_of
from sarathi.entrypoints.server.app import with_middleware
from sarathi.entrypoints.workers.setup import share_of

HEAD = Head(200, ((b"content-type", b"application/json"),))
EVENTS = Head(200, ((b"content-type", b"text/event-stream; charset=utf-8"),))
LOST = ReplicaLostError("r7")


# Prefixes.


def prefix_of(body: object, path: str = "/v1/chat/completions") -> tuple[int, ...]:
    return routing_of(path, json.dumps(body).encode())[0]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def test_a_conversation_that_goes_on_begins_as_before() -> None:
    text = "x" * 3 * BLOCK_BYTES
    before = prefix_of({"model": "m", "messages": turns(text), "temperature": 0})
    after = prefix_of({"temperature": 1, "messages": turns(text, "more" * BLOCK_BYTES)})
    assert len(before) == 3 and after[:3] == before and len(after) > 6


@pytest.mark.parametrize(
    "change", [{"system": "be kind"}, {"tools": [1]}, {"cache_salt": "mine"}, {"messages": turns("y")}]
)
def test_other_prompts_begin_otherwise(change: dict) -> None:
    body = {"messages": turns("x" * 2000)}
    assert not set(prefix_of(body)) & set(prefix_of({**body, **change}))


def test_token_ids_and_texts_have_prefixes_and_broken_bodies_have_none() -> None:
    ids = list(range(1000))
    assert prefix_of({"prompt": ids})[:5] == prefix_of({"prompt": [*ids, 7]})[:5] != ()
    assert prefix_of({"prompt": "short"}) == ()
    assert routing_of("/v1/completions", b'{"prompt": ') == ((), "")
    assert routing_of("/v1/completions", b"[1]") == ((), "")


def test_the_id_of_a_response_names_its_replica() -> None:
    name = f"resp_{response_prefix('ab12')}0123"
    assert routing_of(f"/v1/responses/{name}/cancel", b"")[1] == "ab12"
    body = json.dumps({"input": "go on", "previous_response_id": name}).encode()
    assert routing_of("/v1/responses", body)[1] == "ab12"
    assert routing_of("/v1/responses", b'{"previous_response_id": "resp_0123"}')[1] == ""
    assert routing_of("/v1/responses", b'{"previous_response_id": 7}')[1] == ""


# Affinity.


def test_the_longest_common_beginning_wins_unless_its_replica_is_busy() -> None:
    affinity, names = PrefixAffinity(lead=2), {"a", "b"}
    assert affinity.choose((1, 2), names) is None
    for prefix, name in (((1, 2), "a"), ((1, 9), "b")):
        affinity.start(name)
        affinity.remember(prefix, name)
    assert affinity.choose((1, 2, 3), names) == "a"
    assert affinity.choose((1,), names) == "b"  # the last one that had it
    assert affinity.choose((1, 2), {"b"}) == "b"
    assert affinity.choose((2,), {"b"}) is None
    for _ in range(3):
        affinity.start("a")
    assert affinity.choose((1, 2), names) is None
    affinity.end("a")
    assert affinity.choose((1, 2), names) == "a"


def test_replicas_with_fewer_requests_come_first() -> None:
    affinity = PrefixAffinity(lead=2)
    for name in "aab":
        affinity.start(name)
    assert [sorted(group) for group in affinity.by_load({"a", "b", "c", "d"})] == [["c", "d"], ["b"], ["a"]]
    affinity.end("a")
    assert [sorted(group) for group in affinity.by_load({"a", "b"})] == [["a", "b"]]


def test_the_oldest_beginnings_are_forgotten_and_loads_return_to_nothing() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    affinity, open_requests = PrefixAffinity(lead=0, most_blocks=50), []
    for number in range(400):
        affinity.start(name := rng.choice("abc"))
        affinity.remember((number, -number - 1), name)
        open_requests.append(name)
        if rng.random() < 0.7:
            affinity.end(open_requests.pop(rng.randrange(len(open_requests))))
    for name in open_requests:
        affinity.end(name)
    assert affinity.choose((0,), set("abc")) is None and affinity.choose((399,), set("abc")) is not None
    assert len(affinity._replicas) == 50 and not affinity._running


# One request at the application of a replica.


def application() -> FastAPI:
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> dict:
        CURRENT.get().begin()
        return {"body": (await request.body()).decode(), "query": request.url.query, "key": request.headers["x-key"]}

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def numbers() -> AsyncGenerator[bytes, None]:
            try:
                for number in range(1000):
                    yield b"%d," % number
                    await asyncio.sleep(0)
            finally:
                app.state.ended = True

        return StreamingResponse(numbers())

    return app


def forwarded(path: str, method: str = "GET", body: bytes = b"") -> ForwardedRequest:
    headers = ((b"x-key", b"k"), (b"content-length", str(len(body)).encode()))
    return ForwardedRequest(method, path, b"a=1", headers, body)


def test_an_exchange_is_the_application_s_answer() -> None:
    async def run() -> None:
        pieces = [each async for each in Exchange(application(), forwarded("/echo", "POST", b"hello")).pieces()]
        assert isinstance(pieces[0], Begun) and isinstance(pieces[1], Head) and pieces[1].status == 200
        assert json.loads(pieces[2]) == {"body": "hello", "query": "a=1", "key": "k"}
        whole = await Exchange(application(), forwarded("/stream")).whole("r")
        assert whole.body == b"".join(b"%d," % number for number in range(1000)) and whole.replica == "r"
        assert (await Exchange(application(), forwarded("/nothing")).whole("r")).head.status == 404

    asyncio.run(run())


def test_closing_an_exchange_ends_the_application_s_work() -> None:
    async def run() -> None:
        app = application()
        pieces = Exchange(app, forwarded("/stream")).pieces()
        await anext(pieces)
        await anext(pieces)
        await pieces.aclose()
        assert app.state.ended

    asyncio.run(run())


# The gateway.


class Script:
    """Each attempt plays the next list: pieces, and an exception that ends it."""

    def __init__(self, *attempts: Sequence[Piece | Exception], answers: Sequence[WholeAnswer] = ()) -> None:
        self.attempts = list(attempts)
        self.answers = answers
        self.requests: list[ForwardedRequest] = []

    async def stream(self, request: ForwardedRequest) -> AsyncGenerator[Piece, None]:
        self.requests.append(request)
        for each in self.attempts.pop(0):
            if isinstance(each, Exception):
                raise each
            yield each

    async def ask_all(self, request: ForwardedRequest) -> Sequence[WholeAnswer]:
        return self.answers


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., httpx.Response]:
    monkeypatch.setattr("sarathi.entrypoints.replicas.gateway._RETRY_S", 0.001)

    def ask(script: Script, path: str = "/v1/completions", drain: bool = False, **options: object) -> httpx.Response:
        async def run() -> httpx.Response:
            gateway = Gateway(script)
            if drain:
                await gateway.drain(0)
            app = with_middleware(gateway, load_config(ServerConfig, overrides={"max_body_bytes": 100}), ROUTERS)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
                return await client.request(options.pop("method", "POST"), path, **options)

        return asyncio.run(run())

    return ask


def test_an_answer_passes_with_its_status_and_headers(ask) -> None:
    script = Script([Begun(), Head(418, ((b"x-kind", b"tea"),)), b"one", b"two"])
    answer = ask(script, "/v1/completions?a=b", content=b"{}", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.content, answer.headers["x-kind"]) == (418, b"onetwo", "tea")
    assert answer.headers["x-request-id"] == "mine" and script.requests[0].query == b"a=b"
    assert script.requests[0].body == b"{}" and script.requests[0].method == "POST"


def test_a_body_that_is_too_large_reaches_no_replica(ask) -> None:
    script = Script()
    assert ask(script, content=b"x" * 200).status_code == 413 and not script.requests


@pytest.mark.parametrize("first", [[LOST], [EVENTS, LOST], [HEAD, LOST]])
def test_what_has_not_begun_is_answered_by_another_replica(ask, first: list) -> None:
    script = Script(first, [LOST], [EVENTS, b"data: 1\n\n", b"data: [DONE]\n\n"])
    answer = ask(script)
    assert (answer.status_code, answer.text) == (200, "data: 1\n\ndata: [DONE]\n\n")
    assert [each.avoided for each in script.requests] == [(), ("r7",), ("r7", "r7")]


def test_attempts_are_bounded(ask) -> None:
    script = Script(*[[LOST]] * 5)
    answer = ask(script)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable" and not script.attempts


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/responses"])
def test_a_stream_that_has_begun_ends_with_an_error_of_its_api(ask, path: str) -> None:
    script = Script([EVENTS, b"data: 1\n\n", b"data: 2\n\n", LOST], [])
    answer = ask(script, path)
    assert answer.status_code == 200 and len(script.requests) == 1
    assert answer.text.startswith("data: 1\n\ndata: 2\n\n")
    [last] = [line for line in answer.text.splitlines() if "engine that served the request died" in line]
    told = json.loads(last.removeprefix("data: "))
    if path == "/v1/messages":
        assert (
            told["type"] == "error" and told["error"]["type"] == "overloaded_error" and "event: error\n" in answer.text
        )
    elif path == "/v1/responses":
        assert told["type"] == "error" and told["code"] == "unavailable" and told["sequence_number"] == 2
    else:
        assert told["error"]["code"] == "unavailable" and answer.text.rstrip().endswith(last)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_a_whole_answer_that_has_begun_becomes_an_error(ask, path: str) -> None:
    script = Script([Begun(), LOST], [])
    answer = ask(script, path)
    assert answer.status_code == 503 and len(script.requests) == 1
    assert "engine that served the request died" in answer.json()["error"]["message"]


def test_a_gateway_that_drains_refuses(ask) -> None:
    answer = ask(Script(), drain=True)
    assert answer.status_code == 503 and "draining" in answer.json()["error"]["message"]


# Routes about the server itself.


def whole(replica: str, body: object = None, status: int = 200) -> WholeAnswer:
    return WholeAnswer(replica, Head(status, ()), json.dumps(body).encode())


def test_health_is_that_of_the_best_replica(ask) -> None:
    for path in ("/health", "/ready", "/ping"):
        both = Script(answers=[whole("a", status=503), whole("b")])
        assert ask(both, path, method="GET").status_code == 200
        assert ask(Script(answers=[whole("a", status=503)]), path, method="GET").status_code == 503
        assert ask(Script(), path, method="GET").status_code == 503
    assert ask(Script(answers=[whole("a")]), "/ready", method="GET", drain=True).status_code == 503
    assert ask(Script(answers=[whole("a")]), "/health", method="GET", drain=True).status_code == 200


def test_loads_are_summed_and_changes_made_everywhere(ask) -> None:
    answers = [whole("a", {"model": "m", "running": 2}), whole("b", {"model": "m", "running": 3})]
    assert ask(Script(answers=answers), "/stats", method="GET").json() == {"model": "m", "running": 5}
    refused = [whole("a"), whole("b", {"error": 1}, 403)]
    assert ask(Script(answers=refused), "/sleep").status_code == 403
    assert ask(Script(answers=[whole("a"), whole("b")]), "/sleep").status_code == 200


def test_metrics_of_all_replicas_have_their_names() -> None:
    texts = [
        f'# HELP sarathi:tokens_total Tokens\n# TYPE sarathi:tokens_total counter\nsarathi:tokens_total{{m="x"}} {n}\n'
        "# HELP s Seconds\n# TYPE s histogram\n"
        f's_bucket{{le="1.0"}} {n}\ns_bucket{{le="+Inf"}} {n}\ns_count {n}\ns_sum 1.5\n'
        for n in (3, 4)
    ]
    answers = [WholeAnswer(name, Head(200, ()), text.encode()) for name, text in zip("ab", texts, strict=True)]
    text = merge_metrics(answers, False).body.decode()
    assert 'sarathi:tokens_total{m="x",replica="a"} 3.0' in text and 'm="x",replica="b"} 4.0' in text
    assert text.count("# TYPE sarathi:tokens_total counter") == 1 and text.count("# TYPE s histogram") == 1
    assert 's_bucket{le="+Inf",replica="b"} 4.0' in text and 's_sum{replica="a"} 1.5' in text


def test_limits_are_divided_among_processes() -> None:
    config = share_of(load_config(ServerConfig, overrides={"max_waiting_requests": 5, "max_connections": 8}), 2)
    assert (config.max_waiting_requests, config.max_connections, config.max_waiting_tokens) == (3, 4, None)


def test_knobs_are_checked() -> None:
    assert not load_config(ScalingConfig).uses_ray
    assert load_config(ScalingConfig, overrides={"replicas": 2}).uses_ray
    assert load_config(ScalingConfig, overrides={"max_replicas": 1}).uses_ray
    with pytest.raises(ValueError, match="max_replicas is 2: it must be none or at least replicas, 3"):
        load_config(ScalingConfig, overrides={"replicas": 3, "max_replicas": 2})
    with pytest.raises(ValueError, match="api_workers is 2: it must be 1"):
        load_config(ScalingConfig, overrides={"replicas": 3, "api_workers": 2})


def test_ray_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "sarathi.entrypoints.replicas.server", raising=False)
    assert main(["serve", "--replicas", "2"]) == 1
    assert "ray is not installed: pip install 'sarathi-vattention[ray]'" in capsys.readouterr().err
