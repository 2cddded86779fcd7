"""The file of the measurement of cost, read without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiment.plan import ExperimentError, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from experiment.plan import Plan

__all__ = ["FILE", "read_cost"]

FILE = "cost.json"


def read_cost(plan: Plan, folder: Path) -> dict[str, Any] | None:
    """Its content, None if it is not there.

    Raises:
        ExperimentError: it was made with other settings, or without some of the variants.
    """
    path = folder / FILE
    if not path.exists():
        return None
    content = read_json(path)
    plan.compare(path, content["settings"])
    missing = [variant for variant in plan.variants if variant not in content["seconds"]]
    if missing:
        raise ExperimentError(f"{path} has no {', '.join(missing)}. Remove it, and it is measured anew")
    return content
