"""Give streams to the graphs that other compilers make of a model with hyper-connections.

`torch.compile(model)` without this backend, a compiled train step with another one, a library that
compiles: their graphs declare hyper-connections and are rewritten before that compiler gets them.
They attach nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import IN_PLACE
from mhc_compile.compilation import plain_versions
from mhc_compile.compilation.session import DECLARE
from mhc_compile.config.options import Options
from mhc_compile.errors import CaptureError, MhcError
from mhc_compile.graph_breaks.input_guards import guard_plain_graph
from mhc_compile.graph_breaks.stream_registry import carried_axis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import fx

    from mhc_compile.compilation.in_place import CompileGraph, InPlace


def give_streams_to_other_compilers(compile_graph: CompileGraph) -> None:
    """Make Dynamo rewrite graphs with hyper-connections whatever the backend."""
    _torch.rewrite_for_other_compilers(partial(_with_streams, compile_graph))


def _with_streams(
    compile_graph: CompileGraph, compiler: Callable[..., Any], graph_module: fx.GraphModule, inputs: list[Any]
) -> Callable[..., Any]:
    """Return the compiler for this graph: the given one, or one that rewrites it before."""
    if _torch.inside_export.get() or _torch.innermost_backend_of(compiler).__module__.startswith("mhc_compile."):
        return compiler
    declares = [node for node in graph_module.graph.nodes if node.target in DECLARE]
    if not declares and all(carried_axis(value) is None for value in inputs):
        if _torch.graph_is_part():
            plain_versions.remember(_torch.frame_code())
            guard_plain_graph(graph_module, inputs)
        return compiler
    if torch.compiler.is_exporting():
        raise CaptureError(
            "torch._dynamo.export would export this model without its hyper-connections. Use"
            " torch.export.export(model, inputs), or mhc_compile.plain(model) for the model without them"
        )
    settings = next((found.options for node in declares for found in _in_place_around(node)), Options().resolved)
    inner: Any = {"inner_backend": compiler}
    if _torch.is_inductor(compiler):
        inner = {"inner_backend": "inductor", "inductor": _torch.settings_of(compiler)}
    options = replace(settings, **inner)

    def compile_with_streams(graph_module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            return compile_graph(graph_module, inputs, options, attach=False)
        except MhcError as error:
            _torch.raise_through_dynamo(error)
            raise

    return compile_with_streams


def _in_place_around(node: fx.Node) -> Iterator[InPlace]:
    """Yield what the modules around a node, outermost first, say of their calls."""
    for module in (_torch.root_module(), *_torch.modules_around(node)):
        found = module.__dict__.get(IN_PLACE) if module is not None else None
        if found is not None:
            yield found
