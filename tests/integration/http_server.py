"""A real `sarathi serve` in a process of its own, over a small model on the CPU."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
LONG = {
    "prompt": [1, 2, 3],
    "max_tokens": 30000,
    "ignore_eos": True,
    "temperature": 0,
}  # the body of a request that runs for long
LIMIT_S = 300.0  # far more than anything takes: the machine may be busy
_SMALL = ("--device", "cpu", "--memory-bytes", "64mb")


@dataclass
class RunningServer:
    """url: without a slash at its end. lines: what the process printed."""

    process: "subprocess.Popen[str]"
    url: str
    lines: list[str] = field(default_factory=list)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=LIMIT_S, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=LIMIT_S, **options)

    def end(self, signal_number: int = signal.SIGTERM, timeout_s: float = LIMIT_S) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(signal_number)
        return self.process.wait(timeout_s)


@contextmanager
def running_server(model: str, *options: str, env: dict[str, str] | None = None) -> Iterator[RunningServer]:
    """A server of `model` on a free port, ready for requests; killed at the end if it still runs."""
    has_weights = not Path(model).is_dir() or any(Path(model).glob("*.safetensors"))
    load = () if has_weights else ("--load-format", "dummy")
    words = (sys.executable, "-m", "sarathi", "serve", model, "--port", "0", *_SMALL, *load, *options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment | (env or {}), cwd=ROOT
    )
    try:
        lines: list[str] = []
        server = RunningServer(process, _wait_for_url(process, lines), lines)
        threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True).start()
        yield server
    finally:
        process.kill()
        process.wait()


def _wait_for_url(process: "subprocess.Popen[str]", lines: list[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"is served on (http://\S+)", line):
            return found.group(1)
    raise RuntimeError(f"the server ended with exit code {process.wait()}: {''.join(lines)}")


def documented(mark: str) -> Sequence[str]:
    """The options of the `sarathi serve` in docs/serving.md that has this option."""
    lines = (ROOT / "docs" / "serving.md").read_text().splitlines()
    [found] = [line.split() for line in lines if line.startswith("    sarathi serve --") and mark in line]
    return found[2:]


def options(**values: object) -> Sequence[str]:
    """Command line options of names and values."""
    return [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), str(value))]


def metric(server: RunningServer, name: str) -> float:
    """The sum over labels of what /metrics says."""
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"sarathi:{name}{{"))


def wait_until(condition: Callable[[], bool], failure: str, timeout_s: float = LIMIT_S) -> None:
    """Ask again and again; an AssertionError with the message `failure` after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, failure
        time.sleep(0.05)
