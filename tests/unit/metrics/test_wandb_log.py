"""wandb in its offline mode: a run folder with the summary and the page comes into being, without network."""

from pathlib import Path

import pytest
from test_store import SEED, run

from sarathi.metrics.report import ReportOptions, write_report
from sarathi.metrics.wandb_log import WandbError, WandbTarget, log_report

wandb = pytest.importorskip("wandb", reason="pip install wandb")


def test_offline_run_holds_summary_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    records = run("sarathi", SEED).store.records()
    options = ReportOptions(individual_batches=False, chrome_trace=False, config={"seed": 5})
    summary = write_report(records, tmp_path, options)
    log_report(tmp_path, summary, WandbTarget("a-project", group="g", run_name="r"))
    (run_folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = run_folder.glob("*.wandb")
    content = record.read_bytes()
    assert b"a-project" in content and b"throughput" in content
    (page,) = run_folder.glob("files/media/html/*.html")
    assert page.read_text() == (tmp_path / "report.html").read_text()


def test_what_cannot_be_sent_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(WandbError, match="nothing was sent to wandb_project 'a-project': no API key"):
        log_report(tmp_path, {}, WandbTarget("a-project"))
