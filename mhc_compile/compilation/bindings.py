"""The contract between a site and its parameters. Each front end implements `SiteParameters`.

torch.compile         `ModuleParameters`      graph inputs that Dynamo made of model parameters
dry run of that       `PredictedParameters`   the same, with stand-ins for missing parameters
torch.export          `ProgramParameters`     inputs in the program's signature
symbolic_trace        `AttributeParameters`   attributes of the graph module
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_compile.config.coefficient_spec import parse
from mhc_compile.modules.hyper_connection import parameter_dtype
from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.planning.chain_rejections import reject_site
from mhc_compile.passes.planning.verdict import Reason
from mhc_compile.passes.transforms.stream_builder import Binding, End

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch.fx import Node

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.passes import Plan, Rejection, Site
    from mhc_compile.passes.planning.planner import Planner


@dataclass(frozen=True, eq=False)
class PlannedSite:
    """A site, its `index` in its chain, whether it is the `last` there, and its options."""

    site: Site
    index: int
    last: bool
    options: ResolvedOptions

    @property
    def value(self) -> torch.Tensor:
        """The example value of the sum."""
        value = tensor_value(self.site.add)
        assert value is not None
        return value

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters: float64 for a float64 trunk, else float32."""
        return parameter_dtype(self.value)


def planned_sites(plan: Plan, options: ResolvedOptions) -> tuple[PlannedSite, ...]:
    """Return the sites of a plan, chain by chain, each with its options."""
    return tuple(
        PlannedSite(site, index, site is chain.sites[-1], options.at(site.path))
        for chain in plan.chains
        for index, site in enumerate(chain.sites)
    )


class SiteParameters(ABC):
    """The parameters of the sites of one graph, existing or to be created."""

    @abstractmethod
    def existing(self, planned: PlannedSite) -> HyperConnection | None:
        """Return the hyper-connection that the site already has, maybe on the meta device.

        Raises:
            AttachError: the owner has another `mhc`, or a hyper-connection that contradicts the
                options.
        """

    @abstractmethod
    def bind(self, planned: PlannedSite) -> Binding:
        """Return the parameters of a site that was not rejected, created if missing."""

    def path(self, planned: PlannedSite) -> str:
        """Return the key of the hyper-connection: sites with the same path share it."""
        return planned.site.path

    def rejections(self, planned: tuple[PlannedSite, ...]) -> dict[Node, Rejection]:
        """Reject sites whose path already has parameters of another width."""
        widths: dict[str, int] = {}
        rejected: dict[Node, Rejection] = {}
        for item in planned:
            site, connection = item.site, self.existing(item)
            width = connection.width if connection is not None else widths.setdefault(self.path(item), site.width)
            if width != site.width:
                rejected[site.add] = _width_conflict(site, width)
        return rejected

    def resolve(self, planner: Planner, options: ResolvedOptions) -> tuple[PlannedSite, ...]:
        """Plan until no site is rejected. Return the sites of `planner.plan`."""
        return planned_sites(planner.settle(lambda plan: self.rejections(planned_sites(plan, options))), options)


def bound_names(connection: HyperConnection) -> list[str]:
    """Return the parameter names, read-out included: ["phi", "bias", ..., "read_out.weight"]."""
    read_out = connection.read_out
    return [*connection.names, *(f"read_out.{name}" for name in (read_out.names if read_out is not None else ()))]


def bind_connection(connection: HyperConnection, find: Callable[[str], Node | str | None]) -> Binding | None:
    """Return the binding of a hyper-connection, or None if the graph lacks a parameter.

    Args:
        connection: gives the settings.
        find: maps a parameter name to the graph input or attribute path; None if there is none.
    """
    found = [find(name) for name in bound_names(connection)]
    nodes = [node for node in found if node is not None]
    if len(nodes) < len(found):
        return None
    phi, second, third, *read_out = nodes
    return Binding(
        phi,
        second,
        third,
        connection.streams,
        connection.spec,
        connection.iterations,
        connection.eps,
        gated=connection.rank > 0,
        single_pass=connection.single_pass,
        end=End(_kind(connection), tuple(read_out), parse(connection.spec).pre_eps),
    )


def _kind(connection: HyperConnection) -> str:
    if connection.single_pass:
        return "pre"
    if connection.end == "learned" and connection.rank:
        return "gated"
    return connection.end


def _width_conflict(site: Site, width: int) -> Rejection:
    return reject_site(
        site, Reason.WIDTH_CONFLICT, lambda: f"{site.path} has width {width}, and this call needs {site.width}"
    )
