"""Compile one captured graph: analyze, attach, rewrite, compile."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from mhc_compile import _torch
from mhc_compile.compilation.fallback import attempt, leave_failing_plain, report
from mhc_compile.compilation.inner_compiler import compile_graph, prepare_kernels
from mhc_compile.compilation.observers import notify
from mhc_compile.compilation.session import GraphSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType

    from torch import fx

    from mhc_compile.config.options import ResolvedOptions

#: Code with a compiled version that has no streams: it had no sites when it was traced.
_compiled_plain: weakref.WeakSet[CodeType] = weakref.WeakSet()
#: Several threads may compile at the same time.
_lock = threading.Lock()


def compile_captured(
    graph_module: fx.GraphModule, inputs: list[Any], options: ResolvedOptions, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; see `mhc_compile.backend.mhc`."""
    session = GraphSession.analyze(graph_module, inputs, options)
    attempt(session, lambda: prepare_kernels(session) if session.sites else None)
    leave_failing_plain(session)
    if session.attach():
        _restart_trace()  # raises: the new parameters must be inputs of the graph
    graphs = [attempt(session, session.rewrite)]
    if options.strict:
        report(session)
    session.report()
    notify(session)
    compiled = attempt(
        session, lambda: compile_graph(session, graphs.pop() if graphs else session.rewrite(), inputs, mode)
    )
    report(session)
    if session.is_plain:
        with _lock:
            _compiled_plain.add(session.provenance.frame.code)
    return compiled


def _restart_trace() -> None:
    """Make Dynamo trace the frame again, by an exception."""
    with _lock:
        codes = tuple(_compiled_plain)
        _compiled_plain.clear()
    for code in codes:
        _torch.forget_compiled(code, all_entries=False)
    # A model with new hyper-connections fits no compiled version of its class: without room for one
    # more, the ninth model of a process would hit Dynamo's recompile limit and run without streams.
    _torch.make_room()
    _torch.restart_trace()
