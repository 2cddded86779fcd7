"""Loads of `torch.distributed.checkpoint`: what they ask for, and what there is."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


def observe_distributed_loads(seen: Callable[[Collection[str], Collection[str]], None]) -> None:
    """Let every load call `seen(names that are asked for, names in the checkpoint)` on one rank."""
    plain = DefaultLoadPlanner.set_up_planner
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def set_up_planner(
        planner: DefaultLoadPlanner, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        plain(planner, state_dict, metadata, is_coordinator)
        if metadata is not None and is_coordinator:
            seen(planner.state_dict, metadata.state_dict_metadata)

    DefaultLoadPlanner.set_up_planner = set_up_planner  # type: ignore[method-assign, assignment]
