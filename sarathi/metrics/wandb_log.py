"""Upload of a result to Weights & Biases. wandb is imported when a result is sent."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarathi.metrics.report import PAGE_FILE


class WandbError(RuntimeError):
    """The upload failed; the files on disk are complete."""


@dataclass(frozen=True)
class WandbTarget:
    """Destination of results; wandb picks a value for empty fields. WANDB_MODE=offline keeps everything on disk."""

    project: str
    group: str = ""
    run_name: str = ""
    run_id: str = ""
    sweep_id: str = ""


def log_report(folder: Path, summary: Mapping[str, Any], target: WandbTarget) -> None:
    """Upload the configuration, the summary's numbers, and report.html of `folder` if it exists.

    WandbError if wandb is not installed or refuses the result.
    """
    try:
        import wandb
    except ImportError:
        raise WandbError(
            f"wandb_project is {target.project!r}, but wandb is not installed: pip install 'sarathi-vattention[wandb]'"
        ) from None
    try:
        _send(wandb, folder, summary, target)
    except (wandb.Error, OSError, ValueError) as error:
        raise WandbError(f"nothing was sent to wandb_project {target.project!r}: {error}") from error


def _send(wandb: Any, folder: Path, summary: Mapping[str, Any], target: WandbTarget) -> None:
    run = wandb.init(
        project=target.project,
        group=target.group or None,
        name=target.run_name or None,
        id=target.run_id or None,
        dir=str(folder),
        config={"sweep_id": target.sweep_id, **summary.get("config", {})},
    )
    try:
        run.summary.update(dict(_numbers(summary)))
        if (folder / PAGE_FILE).exists():
            run.log({"report": wandb.Html(str(folder / PAGE_FILE), inject=False)})
    finally:
        run.finish()


def _numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested dicts under dotted names, without configuration and environment."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and name not in ("config", "environment"):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield prefix + name, value
