"""Every measuring script in its --test form, each a process on the CPU: files, columns, exit codes. Not speed."""

from pathlib import Path

import pandas as pd
import pytest
from processes import script

pytestmark = pytest.mark.bench

COLUMNS = ["model", "work", "backend", "batch", "context", "value", "unit", "reference", "ratio"]


def run(name: str, *words: object) -> str:
    said = script(name, *words).stdout
    assert "failed" not in said
    return said


def table(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path)
    assert list(rows.columns) == COLUMNS and path.with_suffix(".environment.json").is_file()
    return rows


def test_engine_and_join(tmp_path: Path) -> None:
    run("benchmark_engine.py", "--test", "--mapped-weights", "--output", tmp_path)
    rows = table(tmp_path / "engine.csv")
    measured = rows[rows.work.str.startswith("prefill") & (rows.backend == "sdpa_vattn")]
    assert len(measured) == 4 and (measured.ratio > 0).all() and (tmp_path / "engine.png").is_file()
    theirs = tmp_path / "theirs.csv"
    rows[rows.backend == "sdpa_vattn"].assign(backend="other", value=rows.value * 2).to_csv(theirs, index=False)
    run("benchmark_vllm.py", "--join", tmp_path / "engine.csv", theirs, "--output", tmp_path)
    joined = table(tmp_path / "vllm.csv").set_index("work")
    ours = joined[joined.backend == "sdpa_vattn"]
    assert ours.loc["KV tokens held"].ratio == 0.5 and (ours.loc["prefill"].ratio == 2).all()


def test_cpu(tmp_path: Path) -> None:
    run("benchmark_cpu.py", "--test", "--output", tmp_path)
    rows = pd.read_csv(tmp_path / "engine_cpu.csv")
    assert list(rows.columns) == COLUMNS and (tmp_path / "environment.json").is_file()
    compared = rows.dropna(subset="ratio")
    assert (
        set(compared.reference) == {"transformers", "sdpa_paged_16", "without a grammar"} and (compared.ratio > 0).all()
    )


def test_prefixes_on_a_cpu(tmp_path: Path) -> None:
    run("benchmark_prefix_cpu.py", "--test", "--output", tmp_path)
    rows = table(tmp_path / "prefix_cpu.csv")
    assert (rows.value > 0).all() and list(rows.reference.fillna("")) == [
        "", "sdpa_vattn", *["sdpa_vattn, caching off"] * 2
    ]  # fmt: skip


def test_transformers_caches(tmp_path: Path) -> None:
    run("benchmark_transformers.py", "--test", "--output", tmp_path)
    rows = table(tmp_path / "transformers.csv").set_index(["work", "backend"]).value
    assert (rows > 0).all() and len(rows) == 4 * 4
    held = rows["long prompt: the cache at its peak"]
    assert held["StaticCache"] > held["VirtualCache"] >= held["StaticCache, length known"] > held["DynamicCache"] * 0.99


def test_allocator(tmp_path: Path) -> None:
    run("benchmark_allocator.py", "--test", "--skip-library", "--output", tmp_path)
    rows = table(tmp_path / "allocator.csv").set_index(["work", "backend"]).value
    assert rows["driver calls", "sdpa_vattn"] > 0
    assert rows["driver calls", "sdpa_vattn, mapped before"] == 0
    assert rows["steps that waited for a page", "sdpa_vattn_sync"] > 0
    steps = pd.read_csv(tmp_path / "allocator_steps.csv")
    assert (steps.groupby("backend").size() == 40).all() and steps.backend.nunique() == 4


def test_layouts(tmp_path: Path) -> None:
    run("benchmark_layouts.py", "--test", "--output", tmp_path)
    rows = table(tmp_path / "layouts.csv")
    crowd = rows[rows.work.str.startswith("requests that run at once")].set_index("backend")
    assert crowd.loc["sdpa_vattn_megacache"].ratio > 1


def test_prefixes(tmp_path: Path) -> None:
    run("benchmark_prefix.py", "--test", "--output", tmp_path)
    rows = table(tmp_path / "prefix.csv").set_index("work")
    at_once, known = (
        rows.loc[f"2 documents, 4 questions {how}"].value for how in ("at once", "to known ones in rounds")
    )
    assert known > 0 and at_once > 0  # milliseconds of a tiny model: which are fewer is luck
    assert (rows[rows.backend == "sdpa_vattn"].ratio.dropna() > 0).sum() > 1
    joined = tmp_path / "joined"
    run("benchmark_prefix.py", "--join", tmp_path / "prefix.csv", tmp_path / "prefix.csv", "--output", joined)
    assert (table(joined / "prefix.csv").ratio.dropna() == 1).sum() > 4


def test_soak_of_a_server(tmp_path: Path) -> None:
    assert "passed" in run("soak_server.py", "--test", "--output", tmp_path)
    rows = table(tmp_path / "soak_server.csv").set_index("unit").value
    assert rows["requests"] > 0 and rows["aborts"] > 0 and rows["checks"] > 1


def test_soak_and_sanitize(tmp_path: Path) -> None:
    said = run("soak.py", "--test", "--output", tmp_path)
    rows = table(tmp_path / "soak.csv").set_index("unit").value
    assert "passed" in said and rows["preemptions"] > 0 and rows["aborts"] > 0 and rows["checks"] > 10
    assert run("sanitize.py", "--test").count("done in") == 3


def test_page_sizes_are_compared_on_a_shape_and_on_a_file(tmp_path: Path) -> None:
    lengths = "".join(f"{prompt},{prompt // 30}\n" for prompt in range(4000, 16000, 20))
    (tmp_path / "lengths.csv").write_text("num_prefill_tokens,num_decode_tokens\n" + lengths)
    for words, name in (((), "max_batch_arxiv_shape"), (("--trace", tmp_path / "lengths.csv"), "max_batch")):
        script("benchmark_page_size.py", "--test", *words, "--output", tmp_path)
        rows = pd.read_csv(tmp_path / f"{name}.csv")
        assert (rows[rows.page_kib == 64].against_2mib_per_layer >= 1).all() and (rows.max_batch > 0).all()
        assert (tmp_path / f"{name}.png").is_file() and (tmp_path / f"{name}.environment.json").is_file()


def test_two_checkouts_are_compared(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    run("compare_revisions.py", root, root, "--test", "--starts", 1, "--rounds", 1, "--output", tmp_path)
    found = pd.read_csv(tmp_path / "revisions.csv").set_index(["work", "context"])
    assert {"decode", "prefill", "first start to first token"} <= set(found.index.get_level_values("work"))
    assert (found.ratio > 0).all() and len(pd.read_csv(tmp_path / "revisions_samples.csv")) == 2 * len(found) == 14


def test_pipeline(tmp_path: Path) -> None:
    run("benchmark_pipeline.py", "--test", "--output", tmp_path)
    rows = table(tmp_path / "pipeline.csv").set_index(["work", "backend"]).value
    for schedule in ("sarathi", "vllm"):
        assert 0 < rows["bubbles of stage 0", f"pipeline of 2, {schedule}"] < 1
        assert rows["requests", f"pipeline of 2, {schedule}"] > 0


def test_ranks(tmp_path: Path) -> None:
    words = ("--executors", "multiproc", "--ranks", 1, 2, "--batches", 8, "--steps", 20)
    run("benchmark_ranks.py", *words, "--output", tmp_path)
    assert (table(tmp_path / "ranks.csv").value > 0).all()


def test_transfer(tmp_path: Path) -> None:
    run("benchmark_transfer.py", "--device", "cpu", "--lengths", 64, 200, "--repeats", 1, "--output", tmp_path)
    rows = table(tmp_path / "transfer.csv").set_index(["work", "backend", "context"]).value
    counts = rows["ranges of a request"]
    assert list(counts["sdpa_vattn_megacache"]) == [2, 2] and list(counts["sdpa_vattn"]) == [64, 64]
    assert list(counts["sdpa_paged_16"]) == [64 * 4, 64 * 13]
