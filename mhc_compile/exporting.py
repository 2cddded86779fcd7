"""`mhc_compile.rewrite` for a `torch.export.ExportedProgram`: the same passes, and a program that needs nothing of ours to run.

An exported program is a graph of ATen operations and a signature that says which graph input is which entry of the state dict. The rewrite adds
inputs for the new parameters behind the old ones, puts the graph on streams, and writes every operator of ours as ATen.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputSpec,
    OutputSpec,
)

from mhc_compile.errors import CaptureError
from mhc_compile.passes import (
    LowerOperators,
    NormalizeAdds,
    Plan,
    RaiseLayerNorms,
    RemoveDeclarations,
    SpellAten,
    expand_plan,
    plan_chains,
    run_passes,
)
from mhc_compile.program import ProgramParameters, ProgramProvenance
from mhc_compile.study import complain

if TYPE_CHECKING:
    from torch.fx import Graph, Node

    from mhc_compile.options import Options

__all__ = ["plan_program", "rewrite_program"]


def rewrite_program(program: ExportedProgram, options: Options) -> ExportedProgram:
    """A program like `program`, on parallel residual streams; see `mhc_compile.rewrite`."""
    graph, parameters, plan = plan_program(program, options)
    if not plan.sites:
        if not parameters.in_use:
            complain(plan.refusals, options, [graph])
        graph = run_passes(program.graph, (RemoveDeclarations(), LowerOperators()))
        return _assemble(program, graph, list(program.graph_signature.input_specs), {})
    bindings, specs = parameters.bind(plan)
    graph = expand_plan(graph, plan, bindings)
    kept = {node.name for node in graph.nodes}
    table = {} if program.dialect == "TRAINING" else dict(default_decompositions())
    graph = run_passes(graph, (LowerOperators({**table, **LowerOperators().decompositions}), SpellAten(table)))
    return _assemble(program, graph, specs, parameters.tensors, kept)


def plan_program(program: ExportedProgram, options: Options) -> tuple[Graph, ProgramParameters, Plan]:
    """The normalised graph of a program, the parameters that its sites have or will have, and the plan for it.

    Raises:
        CaptureError: the program is a joint graph of forward and backward.
        AttachError: the program has hyper-connections that contradict the options.
    """
    signature = program.graph_signature
    if signature.backward_signature is not None:
        raise CaptureError(
            "rewrite takes an ExportedProgram of a forward pass; this one also computes gradients. Rewrite the program first, then make the"
            " joint graph"
        )
    graph = run_passes(program.graph, (RemoveDeclarations(), RaiseLayerNorms(), NormalizeAdds()))
    provenance = ProgramProvenance(graph, program)
    parameters = ProgramParameters(graph, program, options)
    while True:
        plan = plan_chains(
            graph, provenance, min_sites=options.min_sites, refuse=lambda site: parameters.vetoes.get(site.add)
        )
        if not parameters.claim(plan):
            return graph, parameters, plan


def _assemble(
    program: ExportedProgram,
    graph: Graph,
    inputs: list[InputSpec],
    tensors: dict[str, torch.nn.Parameter],
    kept: set[str] | None = None,
) -> ExportedProgram:
    """A program with this graph and these further tensors, otherwise like `program`. `inputs` are the specs of the graph's placeholders, in order."""
    for node in graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta.pop("example_value")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    results: Any = next(iter(reversed(graph.nodes))).args[0]
    before = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    after = [node.name for node, spec in zip(placeholders, inputs, strict=True) if spec.target not in tensors]
    # Graph inputs may change their names in a copy (`input` is one of Python's own); every other node of the program keeps it.
    names = {**{name: name for name in kept or [node.name for node in graph.nodes]}, **dict(zip(before, after, strict=True))}
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(
            input_specs=[_named(spec, node) for spec, node in zip(inputs, placeholders, strict=True)],
            output_specs=[_named(spec, node) for spec, node in zip(program.graph_signature.output_specs, results, strict=True)],
        ),
        state_dict={**program.state_dict, **tensors},
        range_constraints=copy.copy(program.range_constraints),
        module_call_graph=[_call(entry, names) for entry in program.module_call_graph],
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )


def _named(spec: Any, node: Node | Any) -> Any:
    """`spec` for the value that `node` stands for now."""
    if not isinstance(node, torch.fx.Node) or isinstance(spec.arg, ConstantArgument):
        return spec
    return replace(spec, arg=replace(spec.arg, name=node.name))


def _call(entry: Any, names: dict[str, str]) -> Any:
    """The entry of a module call with the names that its values have now.

    The signature of a call whose values are streams now, and so no longer exist, is dropped; `unflatten` makes one from the graph.
    """
    if entry.signature is None:
        return copy.copy(entry)
    arguments = [*entry.signature.inputs, *entry.signature.outputs]
    values = [argument for argument in arguments if not isinstance(argument, ConstantArgument)]
    if entry.fqn and any(argument.name not in names for argument in values):
        return replace(entry, signature=None)

    def renamed(side: list[Any]) -> list[Any]:
        return [replace(a, name=names[a.name]) if a.name in names else a for a in side]

    signature = replace(entry.signature, inputs=renamed(entry.signature.inputs), outputs=renamed(entry.signature.outputs))
    return replace(entry, signature=signature)
