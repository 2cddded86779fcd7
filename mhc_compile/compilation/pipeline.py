"""Compile one captured graph: analyze, attach, rewrite, compile. The backend is this function."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from mhc_compile import _torch
from mhc_compile.compilation.inner_compiler import compile_graph, prepare_kernels
from mhc_compile.compilation.observers import notify
from mhc_compile.compilation.session import GraphSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType

    from torch import fx

    from mhc_compile.config.options import ResolvedOptions

__all__ = ["compile_captured"]

#: Code with a compiled version that has no hyper-connections, because there was nothing to rewrite
#: when it was traced.
_plain: weakref.WeakSet[CodeType] = weakref.WeakSet()
#: Two threads may compile at the same time.
_lock = threading.Lock()


def compile_captured(
    graph_module: fx.GraphModule, inputs: list[Any], options: ResolvedOptions, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; see `mhc_compile.backend.mhc`."""
    session = GraphSession.analyze(graph_module, inputs, options)
    prepare_kernels(session)
    if session.attach():
        _trace_again()
    graph = session.rewrite()
    if session.is_plain:
        with _lock:
            _plain.add(session.provenance.frame.code)
    notify(session)
    return compile_graph(session, graph, inputs, mode)


def _trace_again() -> None:
    """Start the trace again, in which the parameters are inputs of the graph.

    Raises; never returns.
    """
    with _lock:
        codes = tuple(_plain)
        _plain.clear()
    for code in codes:
        _torch.forget_compiled(code, all_entries=False)
    # A model that got its hyper-connections just now fits no compiled version of its class, and
    # needs one of its own. (Once it has them, it shares those of other models like it.) Otherwise
    # the ninth model of a process would meet Dynamo's limit and run without streams.
    _torch.make_room()
    _torch.restart_trace()
