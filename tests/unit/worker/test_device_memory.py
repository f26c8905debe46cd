"""What a device's memory is taken to be: cgroup limits of both versions, budgets, and weights that do not fit."""

import random
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS

from sarathi.config.schema import CacheConfig
from sarathi.model_executor.models import read_architecture
from sarathi.worker import memory
from sarathi.worker.memory import MemoryLimitError, cache_budget_bytes, cgroup_limits, check_budget, check_weights

CPU = torch.device("cpu")
GIB = 2**30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_version_2_limits_of_every_ancestor_are_found(tmp_path: Path) -> None:
    """Documentation/admin-guide/cgroup-v2.rst: memory.max, memory.current, memory.stat; the root has none of them."""
    write(tmp_path, {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/memory.max": "9000\n", "sys/fs/cgroup/user/memory.current": "5000\n",
        "sys/fs/cgroup/user/memory.stat": "anon 4000\nfile 1000\ninactive_file 700\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n", "sys/fs/cgroup/user/job/memory.current": "4000\n",
        "sys/fs/cgroup/user/job/memory.stat": "inactive_file 600\n",
    })  # fmt: skip
    assert cgroup_limits(tmp_path) == [(9000, 4300)]


def test_version_1_limits_are_found_beside_other_controllers(tmp_path: Path) -> None:
    """Documentation/admin-guide/cgroup-v1/memory.rst. The path is the host's: only the mount's root exists here."""
    write(tmp_path, {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/1234\n4:memory:/docker/1234\n0::/docker/1234\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "8000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "3000\n",
        "sys/fs/cgroup/memory/memory.stat": "cache 900\ntotal_inactive_file 500\n",
    })  # fmt: skip
    assert cgroup_limits(tmp_path) == [(8000, 2500)]


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == []


def test_a_cgroup_bounds_free_total_and_default_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = random.randint(1, 9) * GIB // 10
    monkeypatch.setattr(memory, "cgroup_limits", lambda: [(limit, limit // 2)])
    assert memory.total_bytes(CPU) == limit and memory.free_bytes(CPU) == limit - limit // 2
    assert cache_budget_bytes(CacheConfig(), CPU) == (limit - limit // 2) // 4
    check_budget(CacheConfig(memory_bytes=limit), CPU)
    with pytest.raises(MemoryLimitError, match=f"memory_bytes={limit + 1} is more than cpu can give: it has {limit}"):
        check_budget(CacheConfig(memory_bytes=limit + 1), CPU)


def test_weights_are_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * GIB)
    check_weights(3 * GIB // 2, torch.bfloat16, CPU)
    message = r"\d+ parameters x 4 bytes \(float32\) are 6\.0 GiB, cpu has 3\.0 GiB free"
    with pytest.raises(MemoryLimitError, match=message):
        check_weights(3 * GIB // 2, torch.float32, CPU)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_as_transformers_counts_them(name: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    config = CONFIGS[name].to_dict() | {"architectures": [type(model).__name__]}
    assert read_architecture(config).num_parameters == sum(each.numel() for each in model.parameters())
