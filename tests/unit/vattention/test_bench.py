"""The benchmark runs on the host, reports every section, loses no capacity, and saves what it printed."""

import csv
import json

from vattention import bench


def test_bench_prints_and_saves(tmp_path, capsys):
    bench.main(["--device", "cpu", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "vattention_bench.csv").open()))
    saved = json.loads((tmp_path / "vattention_bench.json").read_text())
    assert [row["metric"] for row in rows] == [row["metric"] for row in saved["results"]]
    value = {(row["section"], row["case"], row["metric"]): float(row["value"]) for row in rows}
    assert value["decode growth after large extents", "192 rows", "rows lost"] == 0
    assert value["32768-token prompt, ready", "extents against pages", "ratio"] > 1
    assert value["prepare, nothing to map", "512 slots", "median"] > 0
    assert value["decode loop, memory time of a step", "async", "steps that waited"] < 20
    for call in ("create", "map", "unmap", "destroy"):
        assert f"{call} " in out
