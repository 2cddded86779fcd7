"""The plan for every graph of a model, and what the rewrite would bind to it, while nothing is run and nothing changed.

`explain` reports it, `diff` expands it, and the backend makes it again from the same `study` when the model is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.capture.shared_graphs import Sharing
from mhc_compile.capture.trace import capture
from mhc_compile.compilation.session import Study, study

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import nn

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.graph_breaks.split_branches import Notes
    from mhc_compile.passes import Site
    from mhc_compile.passes.planning.split_branches import BranchHead
    from mhc_compile.passes.transforms.stream_builder import Binding

    OpenBranch = Mapping[nn.Module, Sequence[Site]]

__all__ = ["DryGraph", "dry_run"]


@dataclass(frozen=True, eq=False)
class DryGraph:
    """One graph that Dynamo makes of a model. Valid while Dynamo traces the frame.

    Attributes:
        modules: paths of the modules that run it: the one that was traced, and blocks that are alike; ("",) is the model itself.
        captured: the graph as Dynamo handed it over.
        study: the normalised graph and the plan for it.
        bindings: parameters for every site of the plan, as graph inputs: those that the model has, and inputs that stand for those it will get.
        openings: name and parameters of every branch that begins here and ends in another graph.
        foreseen: the paths of the parameters that it will get, below the traced module.
    """

    modules: tuple[str, ...]
    captured: torch.fx.GraphModule
    study: Study
    bindings: dict[Site, Binding]
    openings: dict[BranchHead, tuple[str, Binding]]
    foreseen: frozenset[str]


def dry_run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: ResolvedOptions,
    on_graph: Callable[[DryGraph], None],
    begun: OpenBranch | None = None,
) -> OpenBranch:
    """Traces `model(*args, **kwargs)` as the compiled call would, and hands over what the backend would do with each graph.

    Args:
        model: any module.
        args: example inputs.
        kwargs: example inputs by name.
        options: of the backend.
        on_graph: is called with every graph, in the order in which they run.
        begun: what an earlier run returned. A branch that a graph break cuts begins in a graph that is traced before the one in which it ends:
            only the second run knows what the first of the two graphs must open.

    Returns:
        The sites of branches that are cut, by the modules that begin them. Empty where no branch is.

    Raises:
        CaptureError: the model cannot be traced with these inputs.
    """
    sharing = Sharing(model)
    cut: dict[nn.Module, list[Site]] = {}

    def look(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Notes:
        result = study(graph_module, inputs, options)
        notes = result.notes()
        for site in result.plan.sites:
            for module in (module for head in site.heads for module in head.alive()):
                cut.setdefault(module, []).append(site)
        bindings, foreseen = result.foresee(options)
        openings, more = result.foresee_openings(begun or {}, options)
        modules = tuple(sharing.modules(result.provenance.root))
        if modules:
            on_graph(DryGraph(modules, graph_module, result, bindings, openings, foreseen | more))
        return notes

    capture(model, args, kwargs, look)
    return cut
