"""The load generator against answers given byte for byte: what servers and proxies between may send."""

import json
import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from sarathi.benchmark.serve.main import main

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"


def token(text: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'text': text}]}, ensure_ascii=False)}\n\n".encode()


@contextmanager
def answering(pieces: Sequence[bytes]) -> Iterator[str]:
    """A server whose every answer is these pieces, each in a segment of its own."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.002)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def load(pieces: Sequence[bytes], folder: Path, code: int) -> dict:
    """The JSON result of two requests that are answered so."""
    words = ["--model", "m", "--num-prompts", "2", "--random-input-len", "5", "--random-output-len", "2"]
    words += ["--disable-tqdm", "--save-detailed", "--result-dir", str(folder), "--result-filename", "r.json"]
    with answering(pieces) as url:
        assert main(["--base-url", url, *words]) == code
    return json.loads((folder / "r.json").read_text())


@pytest.mark.parametrize(
    "pieces",
    [
        [token("é"), token("漢"), USAGE, DONE],
        [bytes([byte]) for byte in token("é") + token("漢") + USAGE + DONE],  # a character and CRLF cut anywhere
        [token("é") + b": keep-alive\n\n" + token("漢") + USAGE + DONE],
        [(token("é") + token("漢") + USAGE + DONE).replace(b"\n", b"\r\n")],
        [(token("é") + token("漢") + USAGE + DONE).replace(b"data: ", b"data:")],
        [b"event: message\nid: 4\nretry: 10\n" + token("é"), b"data:\n\ndata: \n\n", token("漢"), USAGE, DONE],
        [token("é"), token("漢"), USAGE, b"data: [DONE]"],  # the last line is not ended
    ],
)
def test_an_answer_is_read_however_it_is_sent(pieces: list[bytes], tmp_path: Path) -> None:
    result = load([HEAD, *pieces], tmp_path, 0)
    assert result["generated_texts"] == ["é漢"] * 2 and result["output_lens"] == [2, 2]
    assert [len(gaps) for gaps in result["itls"]] == [1, 1] and result["input_lens"] == [7, 7]


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([HEAD, token("a"), b"data: [1]\n\n", DONE], "no chunk of a completion"),
        ([HEAD, token("a"), b'data: "pong"\n\n', DONE], "no chunk of a completion"),
        ([HEAD, b'data: {"choices": ["a"]}\n\n', DONE], "no chunk of a completion"),
        ([HEAD, b'data: {"choices": [{"text": ["a"]}]}\n\n', DONE], "no chunk of a completion"),
        ([HEAD, b'data: {"choices": [{"text": "a"}], "usage": 5}\n\n', DONE], "no chunk of a completion"),
        ([HEAD, b'data: {"usage": {"completion_tokens": "many"}}\n\n', DONE], "no chunk of a completion"),
        ([HEAD, token("a")[:-9], b"\n\n", DONE], "no chunk of a completion"),
        ([HEAD, b"data: \xff\xfe\n\n", DONE], "UnicodeDecodeError"),
        ([HEAD, b"<html>not a stream</html>"], "the stream ended before the answer did"),
        ([b"HTTP/1.1 503 Busy\r\nContent-Type: a; charset=none\r\nConnection: close\r\n\r\nbusy"], "HTTP 503: busy"),
        ([b"HTTP/1.1 429 Slow\r\nConnection: close\r\n\r\n"], "HTTP 429"),
        ([b"220 mail.example ESMTP\r\n"], "Bad status line"),
    ],
)
def test_what_is_no_answer_fails_its_request_and_not_the_load(pieces: list[bytes], told: str, tmp_path: Path) -> None:
    result = load(pieces, tmp_path, 1)
    assert (result["completed"], result["failed"]) == (0, 2)
    assert all(told in error for error in result["errors"]), result["errors"]
