"""Compile one captured graph: analyze, attach, rewrite, compile."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from mhc_compile import _torch
from mhc_compile.attachment.declaration import call_outside_trace
from mhc_compile.attachment.plan import options_of
from mhc_compile.compilation import plain_versions
from mhc_compile.compilation.fallback import attempt, leave_failing_plain, report
from mhc_compile.compilation.in_place import compile_in_place, put_in_place
from mhc_compile.compilation.inner_compiler import compile_graph, prepare_kernels
from mhc_compile.compilation.observers import notify
from mhc_compile.compilation.other_compilers import give_streams_to_other_compilers
from mhc_compile.compilation.session import GraphSession
from mhc_compile.graph_breaks.input_guards import guard_plain_graph

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType

    from torch import fx, nn

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.modules.hyper_connection import HyperConnection

#: The hyper-connections that the trace in progress created before it was restarted.
_created: weakref.WeakSet[HyperConnection] = weakref.WeakSet()
#: Code whose trace was restarted, until it is compiled.
_restarted: weakref.WeakSet[CodeType] = weakref.WeakSet()


def compile_captured(
    graph_module: fx.GraphModule,
    inputs: list[Any],
    options: ResolvedOptions,
    mode: str | None = None,
    *,
    attach: bool = True,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; see `mhc_compile.backend.mhc`.

    Without `attach`, a residual add that has no hyper-connection gets none.
    """
    session = GraphSession.analyze(graph_module, inputs, options)
    if session.swaps_parameters():
        call_outside_trace(session.provenance.frame.code)
        _torch.restart_trace()
    attempt(session, lambda: prepare_kernels(session) if session.sites else None)
    if attach:
        leave_failing_plain(session)
    if session.attach(create=attach):
        _created.update(session.created)
        _restarted.add(session.provenance.frame.code)
        for model in session.models():
            run_on_streams(model, options)
        _restart_trace()  # raises: the new parameters must be inputs of the graph
    graphs = [attempt(session, session.rewrite)]
    if options.strict:
        report(session)
    session.report()
    notify(session)
    code = session.provenance.frame.code

    def compile_rewritten() -> Callable[..., Any]:
        graph = graphs.pop() if graphs else session.rewrite()
        return compile_graph(session, graph, inputs, mode, session.tails(_created, fresh=code in _restarted))

    compiled = attempt(session, compile_rewritten)
    _created.clear()
    _restarted.discard(code)
    report(session)
    if session.is_plain:
        plain_versions.remember(code)
        if session.provenance.frame.is_part:
            guard_plain_graph(graph_module, inputs)
    else:
        _torch.make_room()  # beyond Dynamo's limit the frame would run as the plain model
    return compiled


def run_on_streams(model: nn.Module, options: ResolvedOptions, *, compiled: bool = False) -> None:
    """Make a model that has hyper-connections run on them wherever it is called; see `in_place`."""
    plain_versions.forget()
    give_streams_to_other_compilers(compile_captured)
    options = options_of(model, options)
    (compile_in_place if compiled else put_in_place)(model, options, compile_captured)


def _restart_trace() -> None:
    """Make Dynamo trace the frame again, by an exception."""
    plain_versions.forget()
    # A model with new hyper-connections fits no compiled version of its class: without room for one
    # more, the ninth model of a process would hit Dynamo's recompile limit and run without streams.
    _torch.make_room()
    _torch.restart_trace()
