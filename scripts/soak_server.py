"""Load a server on the CPU with random requests, disconnecting clients and garbage; check memory and file descriptors.

    nice python scripts/soak_server.py --seconds 1200 --output DIR
    python scripts/soak_server.py --test        # 10 seconds

Periodically lets all requests finish: then no cache row may be in use, and sleeping must release all but one row. Exit
code 1 if that fails, if an answer has a wrong number of tokens, or if after the warm-up a process grows by more than 32
MiB or 16 file descriptors. Writes soak_server.csv.
"""

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from sarathi.benchmark.engines.servers import ServerLimits, free_port, our_server, running
from sarathi.benchmark.records import Record, Table
from sarathi.entrypoints.script import run_script

LIMITS = ServerLimits(max_model_len=4096, max_num_seqs=32, chunk_size=512)
OPTIONS = (
    "--device", "cpu", "--attention-backend", "sdpa_vattn", "--memory-bytes", "2mb", "--prefix-caching",
    "--max-waiting-requests", "64", "--heartbeat-timeout-s", "60",
)  # fmt: skip
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
CLIENTS = 24
PERIOD_S = 20.0  # of load, before all requests are let end
WARM_UP_SHARE = 0.3  # of the time; what is in use then is what later use is measured against
MOST_GROWTH = {"MiB": 32.0, "descriptors": 16.0}
TEST_GROWTH = {"MiB": 256.0, "descriptors": 16.0}  # the short form ends before the allocator has its arenas
KEY = "soak"
GARBAGE = (b"", b"{", b'{"prompt": 3}', b'{"prompt": [1], "max_tokens": -1}', b"[" * 5000, b"\xff" * 100)


class Violation(Exception):
    """The server violates an invariant."""


class Soak:
    """Random clients of one server."""

    def __init__(
        self, session: aiohttp.ClientSession, pid: int, seed: int, most_growth: Mapping[str, float] = MOST_GROWTH
    ) -> None:
        self._session, self._pid, self._most_growth = session, pid, most_growth
        self._random = random.Random(seed)
        self._baseline: dict[str, float] = {}
        self.counts: Counter[str] = Counter()
        self.growth: dict[str, float] = {}

    async def run(self, seconds: float) -> None:
        """Raises Violation."""
        start_s = time.monotonic()
        while (elapsed_s := time.monotonic() - start_s) < seconds:
            period_s = min(PERIOD_S, seconds / 5)
            await asyncio.gather(*(self._be_a_client(time.monotonic() + period_s) for _ in range(CLIENTS)))
            await self._check_idle()
            self._watch(is_warm=elapsed_s > WARM_UP_SHARE * seconds)

    async def _be_a_client(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            kind = self._random.choices([self._ask, self._leave, self._send_garbage], [70, 25, 5])[0]
            await kind()

    def _body(self) -> dict[str, Any]:
        length = min(int(self._random.lognormvariate(4.0, 1.2)) + 1, 1500)
        return {
            "prompt": [1, *self._random.choices(range(3, 200), k=length)],
            "max_tokens": min(int(self._random.lognormvariate(3.0, 1.0)) + 1, 300),
            "n": self._random.choice([1, 1, 1, 2]),
            "temperature": self._random.choice([0, 1.0]),
            "ignore_eos": True,
        }

    async def _ask(self) -> None:
        body = self._body()
        async with self._session.post("/v1/completions", json=body) as response:
            if response.status == 429:
                self.counts["refused"] += 1
                await asyncio.sleep(0.1)
                return
            answer = await response.json()
        asked, got = body["n"] * body["max_tokens"], answer.get("usage", {}).get("completion_tokens")
        if got != asked:
            raise Violation(f"a request asked for {asked} tokens and got {got}: {answer}")
        self.counts["requests"] += 1
        self.counts["output tokens"] += got

    async def _leave(self) -> None:
        """Disconnect while the request waits or runs, streaming or not."""
        body = {**self._body(), "stream": self._random.random() < 0.5}
        try:
            await asyncio.wait_for(self._read(body), self._random.random() ** 2 * 2)
        except asyncio.TimeoutError:
            self.counts["aborts"] += 1

    async def _read(self, body: dict[str, Any]) -> None:
        async with self._session.post("/v1/completions", json=body) as response:
            await response.read()

    async def _send_garbage(self) -> None:
        headers = {"Content-Type": "application/json"}
        async with self._session.post("/v1/completions", data=self._random.choice(GARBAGE), headers=headers) as answer:
            if answer.status != 400:
                raise Violation(f"garbage was answered with status {answer.status}")
        self.counts["garbage"] += 1

    async def _check_idle(self) -> None:
        """Check that nothing is in use without requests, and that a sleeping server holds at most one row."""
        deadline_s = time.monotonic() + 60
        while (stats := await self._stats())["running"] or stats["waiting"] or stats["used_rows"]:
            if time.monotonic() > deadline_s:
                raise Violation(f"requests of clients that have left: {stats}")
            await asyncio.sleep(0.1)
        self.counts["checks"] += 1
        self.counts["bytes of cache while asleep"] = await self._sleep_and_wake()

    async def _sleep_and_wake(self) -> int:
        """Put the server to sleep and wake it; returns the cache bytes held while asleep."""
        await self._admin("/sleep")
        stats = await self._stats()
        await self._admin("/wake_up")
        if stats["created_bytes"] > 2**20 or stats["mapped_bytes"] > stats["created_bytes"]:
            raise Violation(f"a sleeping server holds {stats}")
        return int(stats["created_bytes"])

    async def _admin(self, path: str) -> None:
        async with self._session.post(path) as response:
            if response.status != 200:
                raise Violation(f"{path} was answered with status {response.status}: {await response.text()}")

    async def _stats(self) -> dict[str, Any]:
        async with self._session.get("/stats") as response:
            return dict(await response.json())

    def _watch(self, *, is_warm: bool) -> None:
        for name, (used, unit) in in_use(self._pid).items():
            self.growth[name] = max(self.growth.get(name, 0.0), used - self._baseline.get(name, used))
            if not is_warm:
                self._baseline[name] = max(used, self._baseline.get(name, used))
                self.growth[name] = 0.0
            elif self.growth[name] > self._most_growth[unit]:
                raise Violation(f"{name} grew by {self.growth[name]:.1f} after the warm-up")


def in_use(pid: int) -> dict[str, tuple[float, str]]:
    """Memory (without the cache, which is shared memory) and descriptors of server and engine process."""
    [core] = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    found = {}
    for name, each in (("server", pid), ("engine", core)):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
        found[f"memory of the {name}"] = int(status["RssAnon"].split()[0]) / 1024, "MiB"
        found[f"descriptors of the {name}"] = float(len(os.listdir(f"/proc/{each}/fd"))), "descriptors"
    return found


async def soak_server(folder: Path, options: argparse.Namespace) -> tuple[Soak, str]:
    """Run the soak; returns it with its verdict."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    (folder / "config.json").write_text(json.dumps(SHAPE))
    command = our_server(folder, port, LIMITS, OPTIONS)
    os.environ["SARATHI_ADMIN_KEYS"] = KEY
    with running(command, url, folder / "log", start_limit_s=300) as started:
        headers = {"Authorization": f"Bearer {KEY}"}
        connector = aiohttp.TCPConnector(force_close=True)  # none is reused that the server is just closing
        timeout = aiohttp.ClientTimeout(300)
        async with aiohttp.ClientSession(url, headers=headers, timeout=timeout, connector=connector) as session:
            growth = TEST_GROWTH if options.test else MOST_GROWTH
            soak, verdict = Soak(session, started.pid, options.seed, growth), "passed"
            try:
                await soak.run(options.seconds)
            except (Violation, aiohttp.ClientError) as error:
                verdict = f"{type(error).__name__}: {error}; the server: {(folder / 'log').read_text()[-500:]}"
    if "unexpected" in (log := (folder / "log").read_text()):
        verdict = f"the server logged an unexpected error: {log[-2000:]}"
    return soak, verdict


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/soak_server"))
    parser.add_argument("--test", action="store_true", help="10 seconds")
    options = parser.parse_args()
    if options.test:
        options.seconds = 10.0
    return options


def main() -> int:
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        soak, verdict = asyncio.run(soak_server(Path(folder), options))
    options.output.mkdir(parents=True, exist_ok=True)
    table = Table(options.output / "soak_server.csv", verdict=verdict)
    shape = ("sdpa_vattn", LIMITS.max_num_seqs, LIMITS.max_model_len)
    for name, count in soak.counts.items():
        table.add(Record("tiny", f"soak of a server, {options.seconds:g} s: {name}", *shape, count, name))
    for name, value in soak.growth.items():
        unit = "MiB" if "memory" in name else "descriptors"
        table.add(Record("tiny", f"growth of {name}", *shape, round(value, 2), unit))
    print(verdict, flush=True)
    return int(verdict != "passed")


if __name__ == "__main__":
    run_script(main)
