"""From the files of the runs to `summary.json`, the pictures and `RESULTS.md`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiment.plan import ExperimentError, write_json
from experiment.plots import draw_all
from experiment.summary import collect
from experiment.text import results

if TYPE_CHECKING:
    from pathlib import Path

    from experiment.plan import Plan

__all__ = ["report"]


def report(plan: Plan, folder: Path) -> list[Path]:
    """Writes all of it. Returns the paths.

    Raises:
        ExperimentError: no run is finished.
    """
    summary = collect(plan, folder)
    if not summary["runs"]:
        raise ExperimentError(f"no run of this plan is finished in {folder / 'runs'}. Run without --report first")
    write_json(folder / "summary.json", summary)
    pictures = draw_all(summary, folder)
    text = folder / "RESULTS.md"
    text.write_text(results(summary, [path.name for path in pictures]))
    return [folder / "summary.json", *pictures, text]
