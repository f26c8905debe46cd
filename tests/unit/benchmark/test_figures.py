"""Figures of the committed tables: every label lies within the picture, and what is drawn is what the table says."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from sarathi.benchmark import figures
from sarathi.benchmark.figures import FIGURES, draw
from sarathi.metrics import plots
from sarathi.metrics.environment import caption
from sarathi.metrics.plots import Panels

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
TABLES = [path.with_suffix(".csv") for path in sorted(EXPERIMENTS.rglob("*.png")) if path.with_suffix(".csv").exists()]


def figure_of(path: Path) -> Panels:
    name = "max_batch*" if path.stem.startswith("max_batch") else path.stem
    panels = FIGURES[name](pd.read_csv(path))
    assert panels is not None
    return panels


def ratios_of(panels: Panels) -> dict[str, dict[str, str]]:
    """Model and scale -> name of each bar -> its number."""
    found = {}
    for axis in filter(lambda axis: axis.has_data(), panels.axes):
        names = [label.get_text() for label in axis.get_yticklabels()]
        found[f"{axis.get_title()}, {axis.get_xlabel()}"] = dict(
            zip(names, [t.get_text() for t in axis.texts], strict=True)
        )
    return found


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_no_label_of_a_committed_figure_is_cut_off(path: Path) -> None:
    panels = figure_of(path)
    figure = panels.figure
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01, box
    assert any(axis.get_xlabel() for axis in panels.axes)


def test_vllm_shows_whole_work_alone_and_the_numbers_of_the_table() -> None:
    found = ratios_of(figure_of(EXPERIMENTS / "h200" / "vllm.csv"))
    bars = found["llama-3-8b, ratio to vllm-0.26.0; above 1: better"]
    assert {"prefill, 1 x 32K": "1.05", "decode, 1 x 1K": "1.23", "decode, 256 x 1K": "1.09"}.items() <= bars.items()
    assert len(bars) == 18 and not any("step:" in name or "p99" in name for name in bars)
    prefills = [name for name in bars if name.startswith("prefill, 1")]
    assert prefills == [f"prefill, 1 x {size}K" for size in (2, 8, 32, 128)]


def test_a_bar_that_the_axis_cuts_off_shows_it() -> None:
    axis = Panels().axes[0]
    plots.draw_ratios(axis, {"far": 3.12, "near": 1.2, "slow": 0.3}, "ratio")
    gaps = [list(line.get_ydata()) for line in axis.lines if line.get_color() == "white"]
    assert [round(sum(ends) / 2) for ends in gaps] == [0, 2]
    assert [text.get_text() for text in axis.texts] == ["3.12", "1.20", "0.30"]


def test_memory_held_is_drawn_above_what_is_mapped() -> None:
    path = EXPERIMENTS / "cpu" / "memory" / "memory.csv"
    table = pd.read_csv(path).groupby("backend", sort=False)["kv_created_bytes"].max() / 2**20
    for axis in figure_of(path).axes:
        (held,) = (line for line in axis.lines if line.get_label() == "held")
        assert max(held.get_ydata()) == table[axis.get_title()] < axis.get_ylim()[1]


def test_the_bound_is_told_as_a_share_and_other_references_as_ratios() -> None:
    found = ratios_of(figure_of(EXPERIMENTS / "h200" / "engine.csv"))
    bound = found["yi-6b-200k, share of the bound (products and attention alone), %"]
    assert bound["decode, 1 x 1K"] == "88.9" and len(found) == 6


def test_backends_of_one_task_have_a_bar_each() -> None:
    bars = ratios_of(figure_of(EXPERIMENTS / "h200" / "ragged.csv"))
    (llama,) = (each for name, each in bars.items() if name.startswith("llama"))
    table = pd.read_csv(EXPERIMENTS / "h200" / "ragged.csv").query("model == 'llama-3-8b'")
    assert len(llama) == table["ratio"].notna().sum()
    assert llama["decode, lengths as in chats, 900 x 548: triton"] == "1.32"


def test_kernels_are_drawn_over_the_best_paged_one_and_the_engine_s_own_is_told() -> None:
    panels = figure_of(EXPERIMENTS / "h200" / "kernels.csv")
    table = pd.read_csv(EXPERIMENTS / "h200" / "kernels.csv")
    ours = {}
    for axis in panels.axes:
        (line,) = [each for each in axis.lines if str(each.get_label()).startswith("the engine's kernel")]
        ours[axis.get_title()] = dict(zip(*line.get_data(), strict=True))
    at = table.query("model == 'yi-6b-200k' and work == 'decode' and batch == 16 and context == 1024").set_index(
        "backend"
    )
    best = at["value"].filter(like="paged").min()
    own = at.loc["triton default, overlapped launch", "value"]
    assert ours["yi-6b-200k: decode, batch 16"][1024] == pytest.approx(own / best)
    prefill = table.query("model == 'llama-3-8b' and work == 'prefill' and context == 1024").set_index("backend")[
        "value"
    ]
    expected = prefill["fa3 contiguous (fa3-fwd)"] / prefill.filter(like="paged").min()
    assert ours["llama-3-8b: prefill"][1024] == pytest.approx(expected)


@pytest.mark.parametrize("left", ["paged", "contiguous", "triton"])
def test_kernels_are_drawn_whichever_libraries_are_there(left: str) -> None:
    table = pd.read_csv(EXPERIMENTS / "h200" / "kernels.csv")
    panels = FIGURES["kernels"](table[table["backend"].str.contains(left)])
    assert panels is not None and panels.data_uri("caption").startswith("data:image/png;base64,")


def test_runs_of_one_backend_are_lines_and_bars_of_their_own() -> None:
    records = pd.DataFrame({
        "model": "m", "backend": "sdpa_vattn", "workload": "w", "variant": ["seed 1", "seed 2"],
        "makespan_s": [3.0, 4.0], "qps": [2.0, 2.0], "p50": [0.1, 0.2], "p90": [0.1, 0.2], "p99": [0.1, 0.2],
    })  # fmt: skip
    (bars,) = ratios_of(FIGURES["makespan"](records)).values()
    assert bars == {"sdpa_vattn seed 1": "3", "sdpa_vattn seed 2": "4"}
    lines = FIGURES["latency"](records).axes[0].lines
    assert [line.get_label() for line in lines] == ["sdpa_vattn seed 1", "sdpa_vattn seed 2"]


def test_percentiles_of_each_run_are_drawn() -> None:
    (axis,) = figure_of(EXPERIMENTS / "cpu" / "sarathi_claim" / "between_tokens.csv").axes
    table = pd.read_csv(EXPERIMENTS / "cpu" / "sarathi_claim" / "between_tokens.csv")
    drawn = {str(line.get_label()): list(line.get_xdata()) for line in axis.lines}
    assert drawn["sdpa_vattn_megacache vllm"] == table.set_index("scheduler").loc["vllm"][
        ["tbt_p50", "tbt_p90", "tbt_p99", "tbt_max"]
    ].tolist() and len(drawn) == len(table)


def test_a_figure_names_models_hardware_and_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(EXPERIMENTS / "h200" / "vllm.csv", tmp_path)
    shutil.copy(EXPERIMENTS / "h200" / "vllm.environment.json", tmp_path)
    told: list[str] = []
    save = Panels.save
    monkeypatch.setattr(Panels, "save", lambda panels, path, said: (told.append(said), save(panels, path, said)))
    draw(tmp_path / "vllm.csv")
    assert (tmp_path / "vllm.png").read_bytes().startswith(b"\x89PNG")
    assert told == ["llama-3-8b, yi-6b-200k; 1 x NVIDIA H200; torch 2.11.0; revision 48c1b38, 9814ba7"]
    assert figures._models(EXPERIMENTS / "h200" / "allocator_steps.csv", pd.DataFrame()) == ["llama-3-8b"]
    assert caption([{"git": None, "processor": "cpu"}], ["m"]) == "m; cpu"


def test_tables_without_a_figure_and_empty_tables_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "soak.csv").write_text("model,work\nm,w\n")
    (tmp_path / "engine.csv").write_text("model,work,backend,batch,context,value,unit,reference,ratio\n")
    for name in ("soak", "engine"):
        draw(tmp_path / f"{name}.csv")
    assert not list(tmp_path.glob("*.png")) and figures.read_environments(tmp_path / "soak.csv") == []
