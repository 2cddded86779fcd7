"""Who is told of every graph that the backend has studied: nobody, but below `mhc run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.compilation.session import GraphSession

__all__ = ["observers"]

#: Called while Dynamo traces, with the sites of the graph bound to their parameters and nothing rewritten yet.
observers: list[Callable[[GraphSession], None]] = []
