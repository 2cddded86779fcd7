"""Predict how the backend rewrites every graph of a model, without running or changing it.

`explain` reports the result and `diff` expands it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.capture.shared_graphs import Sharing
from mhc_compile.capture.trace import capture
from mhc_compile.compilation.fallback import try_out
from mhc_compile.compilation.module_parameters import PredictedParameters
from mhc_compile.compilation.session import GraphSession
from mhc_compile.errors import MhcError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import nn

    from mhc_compile.compilation.bindings import PlannedSite
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.graph_breaks.split_branches import Notes
    from mhc_compile.passes import Site
    from mhc_compile.passes.planning.plan import BranchHead
    from mhc_compile.passes.transforms.stream_builder import Binding

    #: The sites at the ends of the branches that a module starts.
    Begun = Mapping[nn.Module, Sequence[PlannedSite]]


@dataclass(frozen=True, eq=False)
class DryGraph:
    """One graph that Dynamo makes of a model. Valid while Dynamo traces the frame.

    Attributes:
        modules: paths of the modules that run it: the traced one and equivalent blocks; ("",) is
            the model itself.
        session: the normalised graph and its plan.
        bindings: parameters of every site, as graph inputs; stand-ins where none exist yet.
        openings: name and parameters of every branch that starts here and ends in another graph.
        foreseen: paths of the parameters to be created, below the traced module.
    """

    modules: tuple[str, ...]
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
    """Trace `model(*args, **kwargs)` as the compiled call would, and predict each rewrite.

    `on_graph` gets the graphs in the order in which they run. Return the sites of split branches by
    the modules that start them. The first half of such a branch is traced before its site is known:
    to predict its rewrite, run again with the result as `begun`.

    Raises:
        CaptureError: the model cannot be traced with these inputs.
    """
    sharing = Sharing(model)
    cut: dict[nn.Module, list[PlannedSite]] = {}

    def look(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Notes:
        session = GraphSession.analyze(graph_module, inputs, options)
        parameters = PredictedParameters(session.graph, session.provenance)
        with contextlib.suppress(MhcError):  # the compiled call raises it
            parameters = try_out(session)
        annotations = session.annotations()
        for planned in session.sites:
            for module in (module for head in planned.site.heads for module in head.alive()):
                cut.setdefault(module, []).append(planned)
        bindings = {item.site: parameters.bind(item) for item in parameters.resolve(session.planner, options)}
        openings = parameters.predicted_openings(session.plan, begun or {})
        modules = tuple(sharing.modules(session.provenance.root, session.provenance.frame))
        if modules:
            foreseen = frozenset(parameters.added)
            on_graph(DryGraph(modules, session, bindings, openings, foreseen))
        return annotations

    capture(model, args, kwargs, look)
    return cut
