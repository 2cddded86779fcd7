"""Compile one captured graph: analyze, attach, rewrite, compile."""

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
    from mhc_compile.modules.hyper_connection import HyperConnection

#: Code with a compiled version that has no streams: it had no sites when it was traced.
_compiled_plain: weakref.WeakSet[CodeType] = weakref.WeakSet()
#: The hyper-connections that the trace in progress created before it was restarted.
_created: weakref.WeakSet[HyperConnection] = weakref.WeakSet()
#: Code whose trace was restarted, until it is compiled.
_restarted: weakref.WeakSet[CodeType] = weakref.WeakSet()
#: Several threads may compile at the same time.
_lock = threading.Lock()


def compile_captured(
    graph_module: fx.GraphModule, inputs: list[Any], options: ResolvedOptions, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; see `mhc_compile.backend.mhc`."""
    session = GraphSession.analyze(graph_module, inputs, options)
    prepare_kernels(session)
    if session.attach():
        _created.update(session.created)
        _restarted.add(session.provenance.frame.code)
        _restart_trace()  # raises: the new parameters must be inputs of the graph
    graph = session.rewrite()
    if session.is_plain:
        with _lock:
            _compiled_plain.add(session.provenance.frame.code)
    notify(session)
    code = session.provenance.frame.code
    tails = session.tails(_created, fresh=code in _restarted)
    _created.clear()
    _restarted.discard(code)
    return compile_graph(session, graph, inputs, mode, tails)


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
