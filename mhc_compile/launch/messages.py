"""What `mhc run` says: one line when the first model of a class is rewritten, and at the end whatever that line could not know."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from mhc_compile.launch.order import Order
from mhc_compile.options import Options

if TYPE_CHECKING:
    from mhc_compile.launch.tally import Graph, Total

__all__ = ["at_exit", "say_first"]


def say_first(order: Order, graph: Graph) -> None:
    """That a model is being compiled with hyper-connections, now: a run that is killed never comes to its end."""
    options = Options.parse(order.options)
    _say(
        order,
        f"{graph.kind}: {_connections(graph.connections)}, {_left_alone(graph.left_alone)}"
        f" (streams {options.streams}, mapping {options.mapping}, start {options.start})",
    )


def at_exit(value: str) -> None:
    """The last words of the script: what was rewritten in all, or that nothing was. Children say nothing here."""
    from mhc_compile.launch import activation
    from mhc_compile.launch.tally import Tally

    order = Order.load(value)
    if os.getpid() != order.pid:
        return
    total = (activation.tally or Tally(order)).with_children()
    if not total.connections:
        if not hasattr(sys, "last_type"):  # an exception ended the script, and is what the user must read
            _say(order, f"nothing was rewritten: {_why(order, total)}")
    elif len([graph for graph in total.graphs if graph.connections or graph.left_alone]) > 1:
        models = ", ".join(kind if count == 1 else f"{count} × {kind}" for kind, count in total.models.items())
        where = f" in {total.processes} processes" if total.processes > 1 else ""
        _say(order, f"in all {_connections(total.connections)} ({models}){where}, {_left_alone(total.left_alone)}")


def _why(order: Order, total: Total) -> str:
    from mhc_compile.launch._torch import captured_graphs

    if total.graphs:
        return (
            f"{order.script} compiled {len(total.graphs)} graphs with mhc, none with residual adds that can be rewritten."
            " `mhc explain` shows each addition with its reason"
        )
    if captured_graphs():
        return (
            f"{order.script} names a backend in every torch.compile(...) that it runs, and mhc run leaves those alone."
            " Leave backend= away, or write backend='mhc'"
        )
    return (
        f"{order.script} ran no model that torch.compile made."
        " Write model = torch.compile(model), without a backend, in front of the training loop"
    )


def _connections(count: int) -> str:
    return f"{count} hyper-connection{'s' if count != 1 else ''}"


def _left_alone(count: int) -> str:
    return f"{count} addition{'s' if count != 1 else ''} left alone"


def _say(order: Order, message: str) -> None:
    """A line on stderr, of one process in a group of torchrun's."""
    if order.quiet or os.environ.get("RANK", "0") != "0" or sys.__stderr__ is None:
        return
    with contextlib.suppress(OSError, ValueError):  # the script closed it, or who read it has gone
        sys.__stderr__.write(f"mhc run: {message}\n")
        sys.__stderr__.flush()
