"""`mhc_compile.rewrite` for a `torch.export.ExportedProgram`.

The rewrite adds graph inputs for the new parameters after the existing ones, expands the graph onto
streams, and lowers every `mhc::` operator to ATen, so that the program runs without this package.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
)

from mhc_compile.attachment.plan import options_of
from mhc_compile.compilation.messages import warn_nothing_rewritten
from mhc_compile.config.options import Options
from mhc_compile.errors import CaptureError
from mhc_compile.export.program_parameters import ProgramParameters, ProgramProvenance
from mhc_compile.passes import NORMALIZE, Pass, Plan, Site, expand_plan, run_passes
from mhc_compile.passes.planning.planner import Planner
from mhc_compile.passes.transforms.expand_streams import RemoveDeclarations
from mhc_compile.passes.transforms.lower_to_aten import CanonicalizeAten, LowerOperators, RecomposeLayerNorms

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import Graph, Node

    from mhc_compile.compilation.bindings import PlannedSite
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.passes.transforms.stream_builder import Binding

#: The passes before sites are searched.
PREPARE: tuple[Pass, ...] = (RecomposeLayerNorms(), *NORMALIZE)


def rewrite_program(program: ExportedProgram, options: ResolvedOptions) -> ExportedProgram:
    """Return a program like `program` on parallel residual streams; see `mhc_compile.rewrite`."""
    found = plan_program(program, options)
    parameters, graph = found.parameters, found.graph
    if not found.plan.sites:
        if not parameters.in_use:
            warn_nothing_rewritten(found.plan.rejections, options, [graph])
        graph = run_passes(program.graph, (RemoveDeclarations(), LowerOperators()))
        return _assemble(program, graph, list(program.graph_signature.input_specs), {})
    graph = expand_plan(graph, found.plan, found.bind())
    kept = {node.name for node in graph.nodes}
    graph = run_passes(graph, lowering(program))
    return _assemble(program, graph, parameters.specs, parameters.tensors, kept)


def rewrite_attached(model: nn.Module, program: ExportedProgram) -> ExportedProgram:
    """Return the program of a model on the streams of its hyper-connections, which it only has.

    Raises:
        CaptureError: a hyper-connection whose module runs in the program has no part in it.
    """
    rewritten = rewrite_program(program, options_of(model, Options().resolved))
    targets = {
        node: str(spec.target)
        for node, spec in zip(
            program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True
        )
    }
    declared = {
        targets[node.args[0]]: [targets[parameter] for parameter in node.args]
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.mhc.declare.default)
    }
    inputs = zip(rewritten.graph.find_nodes(op="placeholder"), rewritten.graph_signature.input_specs, strict=True)
    read = {str(spec.target) for node, spec in inputs if node.users}
    # Static coefficients do not read phi.
    idle = [phi for phi, parameters in declared.items() if read.isdisjoint(parameters)]
    if idle:
        raise CaptureError(
            f"torch.export: {len(idle)} of the {len(declared)} hyper-connections that run in this program have no part in"
            f" it ({idle[0].removesuffix('.phi')}, ...): the program would be another function than the model."
            " mhc_compile.explain(model, ...) shows each addition with its reason; mhc_compile.plain(model) exports"
            " without hyper-connections"
        )
    return rewritten


def lowering(program: ExportedProgram) -> tuple[Pass, ...]:
    """Return the passes that lower the rewritten graph of `program` to ATen."""
    table = {} if program.dialect == "TRAINING" else dict(default_decompositions())
    return LowerOperators({**table, **LowerOperators().decompositions}), CanonicalizeAten(table)


@dataclass(frozen=True, eq=False)
class PlannedProgram:
    """The normalised graph of a program, its plan, and the parameters of its sites."""

    graph: Graph
    plan: Plan
    sites: tuple[PlannedSite, ...]
    parameters: ProgramParameters

    def bind(self) -> dict[Site, Binding]:
        """Return the parameters of every site as graph inputs, created if missing."""
        return {planned.site: self.parameters.bind(planned) for planned in self.sites}


def plan_program(program: ExportedProgram, options: ResolvedOptions) -> PlannedProgram:
    """Plan the graph of a program. Raise CaptureError for a joint graph of forward and backward."""
    signature = program.graph_signature
    if signature.backward_signature is not None:
        raise CaptureError(
            "rewrite takes an ExportedProgram of a forward pass; this one also computes gradients. Rewrite the program"
            " first, then make the joint graph"
        )
    graph = run_passes(program.graph, PREPARE)
    planner = Planner(graph, ProgramProvenance(graph, signature.input_specs), options.min_chain_length)
    parameters = ProgramParameters(graph, program)
    sites = parameters.resolve(planner, options)
    return PlannedProgram(graph, planner.plan, sites, parameters)


def _assemble(
    program: ExportedProgram,
    graph: Graph,
    inputs: list[InputSpec],
    tensors: dict[str, Any],
    kept: set[str] | None = None,
) -> ExportedProgram:
    """Return `program` with another graph, its input specs, and new state dict entries `tensors`.

    `kept` names the program's values that the graph still has, by default all of the graph.
    """
    for node in graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta.pop("example_value")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = iter([node.name for node in program.graph.nodes if node.op == "placeholder"])
    parameters = set(program.graph_signature.parameters)
    for node, spec in zip(placeholders, inputs, strict=True):
        if spec.kind is not InputKind.PARAMETER or spec.target in parameters:
            # A copy renames inputs whose names are Python builtins (`input`).
            node.name = next(names)
    results: Any = next(iter(reversed(graph.nodes))).args[0]
    outputs = [_named(spec, node) for spec, node in zip(program.graph_signature.output_specs, results, strict=True)]
    inputs = [_named(spec, node) for spec, node in zip(inputs, placeholders, strict=True)]
    kept = ({node.name for node in graph.nodes} if kept is None else kept) | {node.name for node in placeholders}
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={**program.state_dict, **tensors},
        range_constraints=copy.copy(program.range_constraints),
        module_call_graph=[_call(entry, kept, outputs) for entry in program.module_call_graph],
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )


def _named(spec: Any, node: Node | Any) -> Any:
    """Return `spec` with the current name of `node`."""
    if not isinstance(node, torch.fx.Node) or isinstance(spec.arg, ConstantArgument):
        return spec
    return replace(spec, arg=replace(spec.arg, name=node.name))


def _call(entry: Any, kept: set[str], outputs: list[OutputSpec]) -> Any:
    """Return the entry of a module call, without its signature if a value of it is now streams.

    `unflatten` derives the signature from the graph. That of the root stays.
    """
    signature = copy.deepcopy(entry.signature)
    if signature is None:
        return replace(entry)
    if not entry.fqn:
        results = [spec.arg for spec in outputs if spec.kind is OutputKind.USER_OUTPUT]
        return replace(entry, signature=replace(signature, outputs=results if signature.outputs else []))
    arguments = [*signature.inputs, *signature.outputs]
    values = [argument.name for argument in arguments if not isinstance(argument, ConstantArgument)]
    return replace(entry, signature=signature if kept.issuperset(values) else None)
