"""What `mhc run` says: one line when the first model of a class is rewritten, and at the end whatever that line could not know."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from mhc_compile._torch.default_backend import captured_graphs

if TYPE_CHECKING:
    from mhc_compile.tools.launcher.order import Order
    from mhc_compile.tools.launcher.tally import Graph, Tally, Total

__all__ = ["say_first", "say_last"]


def say_first(order: Order, graph: Graph) -> None:
    """That a model is being compiled with hyper-connections, now: a run that is killed never comes to its end."""
    found = f"{_count(graph.connections, 'hyper-connection')}, {_count(graph.left_alone, 'addition')} left alone"
    _say(order, f"mhc run: {graph.kind}: {found} ({graph.form})")


def say_last(tally: Tally) -> None:
    """The last words of the script: what was rewritten in all, or that nothing was. Children say nothing here."""
    order = tally.order
    if os.getpid() != order.pid:
        return
    total = tally.with_children()
    if not total.connections:
        if not hasattr(sys, "last_type"):  # an exception ended the script, and is what the user must read
            _say(order, _why(order, total))
    elif len([graph for graph in total.graphs if graph.connections or graph.left_alone]) > 1:
        models = ", ".join(kind if count == 1 else f"{count} × {kind}" for kind, count in total.models.items())
        where = f" in {total.processes} processes" if total.processes > 1 else ""
        found = f"{_count(total.connections, 'hyper-connection')} ({models}){where}"
        _say(order, f"mhc run: in all {found}, {_count(total.left_alone, 'addition')} left alone")


def _why(order: Order, total: Total) -> str:
    if total.graphs:
        return (
            f"mhc run: nothing was rewritten: {order.script} compiled {_count(len(total.graphs), 'graph')} with mhc, and none has"
            " residual adds that can be rewritten. `mhc explain` shows each addition with its reason"
        )
    if captured_graphs():
        return (
            f"mhc run: nothing was rewritten: {order.script} names a backend in every torch.compile(...) that it runs,"
            " and mhc run leaves those alone. Leave backend= away, or write backend='mhc'"
        )
    return order.never_compiled


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number != 1 else ''}"


def _say(order: Order, message: str) -> None:
    """A line on stderr, of one process in a group of torchrun's."""
    if order.quiet or os.environ.get("RANK", "0") != "0" or sys.__stderr__ is None:
        return
    with contextlib.suppress(OSError, ValueError):  # the script closed it, or who read it has gone
        sys.__stderr__.write(f"{message}\n")
        sys.__stderr__.flush()
