"""The plan for every graph of a model, and what the rewrite would bind to it, while nothing is run and nothing changed.

`explain` reports it, `diff` expands it, and the backend makes it again by the same `GraphSession`
when the model is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.capture.shared_graphs import Sharing
from mhc_compile.capture.trace import capture
from mhc_compile.compilation.module_parameters import PredictedParameters
from mhc_compile.compilation.session import GraphSession

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import nn

    from mhc_compile.compilation.bindings import PlannedSite
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.graph_breaks.split_branches import Notes
    from mhc_compile.passes import Site
    from mhc_compile.passes.planning.split_branches import BranchHead
    from mhc_compile.passes.transforms.stream_builder import Binding

    #: The sites that end the branches which a module begins.
    Begun = Mapping[nn.Module, Sequence[PlannedSite]]

__all__ = ["DryGraph", "dry_run"]


@dataclass(frozen=True, eq=False)
class DryGraph:
    """One graph that Dynamo makes of a model. Valid while Dynamo traces the frame.

    Attributes:
        modules: paths of the modules that run it: the one that was traced, and blocks that are
            alike; ("",) is the model itself.
        captured: the graph as Dynamo handed it over.
        session: the normalised graph and the plan for it.
        bindings: parameters for every site of the plan, as graph inputs: those that the model has,
            and inputs that stand for those it will get.
        openings: name and parameters of every branch that begins here and ends in another graph.
        foreseen: the paths of the parameters that it will get, below the traced module.
    """

    modules: tuple[str, ...]
    captured: torch.fx.GraphModule
    session: GraphSession
    bindings: dict[Site, Binding]
    openings: dict[BranchHead, tuple[str, Binding]]
    foreseen: frozenset[str]


def dry_run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: ResolvedOptions,
    on_graph: Callable[[DryGraph], None],
    begun: Begun | None = None,
) -> Begun:
    """Trace `model(*args, **kwargs)` as the compiled call would, and hand over what the backend would do with each graph.

    Args:
        model: any module.
        args: example inputs.
        kwargs: example inputs by name.
        options: of the backend.
        on_graph: is called with every graph, in the order in which they run.
        begun: what an earlier run returned. A branch that a graph break cuts begins in a graph that
            is traced before the one in which it ends: only the second run knows what the first of
            the two graphs must open.

    Returns:
        The sites of branches that are cut, by the modules that begin them. Empty where no branch
        is.

    Raises:
        CaptureError: the model cannot be traced with these inputs.
    """
    sharing = Sharing(model)
    cut: dict[nn.Module, list[PlannedSite]] = {}

    def look(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Notes:
        session = GraphSession.analyze(graph_module, inputs, options)
        annotations = session.annotations()
        for planned in session.sites:
            for module in (module for head in planned.site.heads for module in head.alive()):
                cut.setdefault(module, []).append(planned)
        parameters = PredictedParameters(session.graph, session.provenance)
        bindings = {one.site: parameters.bind(one) for one in parameters.resolve(session.planner, options)}
        openings = parameters.predicted_openings(session.plan, begun or {})
        modules = tuple(sharing.modules(session.provenance.root, session.provenance.frame))
        if modules:
            foreseen = frozenset(parameters.added)
            on_graph(DryGraph(modules, graph_module, session, bindings, openings, foreseen))
        return annotations

    capture(model, args, kwargs, look)
    return cut
