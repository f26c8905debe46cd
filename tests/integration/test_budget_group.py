"""Two real servers on the CPU that share one total: idle memory follows the load, and comes back."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from http_server import RunningServer, options, running_server
from small_models import save_tiny_model

NUM_REQUESTS, MAX_TOKENS = 80, 200  # each holds a row of pages
TOTAL_ROWS = 32
LIMIT_S = 300.0


def total_rows(server: RunningServer) -> int:
    return server.get("/stats").json()["total_rows"]


def wait_until(condition: Callable[[], bool]) -> float:
    """Seconds that it took."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() < start_s + LIMIT_S
        time.sleep(0.02)
    return time.monotonic() - start_s


def answer(server: RunningServer, number: int, max_tokens: int = MAX_TOKENS) -> int:
    body = {"prompt": [number, 5, 6], "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    done = server.post("/v1/completions", json=body)
    return done.json()["usage"]["completion_tokens"] if done.status_code == 200 else 0


@pytest.mark.slow
def test_idle_memory_serves_the_others_peak_and_a_killed_servers_share_returns(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny", max_position_embeddings=8192)
    chosen = options(attention_backend="sdpa_vattn", max_num_seqs=64, memory_bytes="8mb", kv_budget_group="pair")
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with (
        running_server(model, *chosen, env=env) as one, running_server(model, *chosen, env=env) as other,
        ThreadPoolExecutor(2 * NUM_REQUESTS) as pool,
    ):  # fmt: skip
        first = [pool.submit(answer, one, number) for number in range(NUM_REQUESTS)]
        grown_s = wait_until(lambda: total_rows(one) > 3 * TOTAL_ROWS // 4)
        second = [pool.submit(answer, other, number) for number in range(NUM_REQUESTS)]
        back_s = wait_until(lambda: total_rows(other) >= TOTAL_ROWS // 2 - 1)
        assert min(total_rows(one) + total_rows(other) for _ in range(50)) <= TOTAL_ROWS  # rows move between two reads
        print(f"grown beyond half after {grown_s:.2f} s, its share back after {back_s:.2f} s")
        assert [each.result() for each in [*first, *second]] == [MAX_TOKENS] * (2 * NUM_REQUESTS)

        pool.submit(answer, other, 1, 8000)
        wait_until(lambda: total_rows(one) + total_rows(other) > TOTAL_ROWS - 3)
        other.process.send_signal(signal.SIGKILL)
        returned_s = wait_until(lambda: total_rows(one) == TOTAL_ROWS)
        print(f"a killed server's share is there after {returned_s:.2f} s")
        assert answer(one, 3) == MAX_TOKENS
