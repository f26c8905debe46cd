"""docs/serving.md: its commands and its Python run against a real server; the dashboard asks for metrics that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

from http_server import LIMIT_S, ROOT, RunningServer

TEXT = (ROOT / "docs" / "serving.md").read_text()


def blocks(language: str, server: RunningServer) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert found
    port = server.url.rpartition(":")[2]
    return "\n".join(found).replace("http://127.0.0.1:8000", server.url).replace("--port 8000", f"--port {port}")


def test_the_commands_run(server: RunningServer) -> None:
    command = f"set -e\nsarathi() {{ '{sys.executable}' -m sarathi \"$@\"; }}\n{blocks('bash', server)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: [DONE]" in done.stdout and "Successful requests:" in done.stdout


def test_the_python_runs(server: RunningServer) -> None:
    words = [sys.executable, "-c", blocks("python", server)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0 and "CompletionUsage" in done.stdout, done.stdout + done.stderr


def test_the_dashboard_asks_for_metrics_that_exist(server: RunningServer) -> None:
    server.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    published = server.get("/metrics").text
    asked = set(re.findall(r"sarathi:\w+", json.dumps(json.loads((Path(ROOT) / "docs" / "grafana.json").read_text()))))
    assert len(asked) > 10
    missing = {name for name in asked if not re.search(rf"^{name}(\{{| )", published, re.MULTILINE)}
    assert not missing - {"sarathi:request_success_total"}  # there after the first request of each kind
