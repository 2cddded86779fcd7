"""From a site to its parameters, or to a rejection: one contract for every way in which a graph is obtained.

Dynamo, compiling     `ModuleParameters`      the graph inputs that Dynamo made of a model's parameters
Dynamo, dry run       `PredictedParameters`   those, and inputs that stand for parameters to come
torch.export          `ProgramParameters`     inputs of the program's signature, old and new
symbolic_trace        `AttributeParameters`   attributes of the graph module
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_compile.config.coefficient_spec import parse
from mhc_compile.modules.hyper_connection import parameter_dtype
from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.planning.chains import reject_site
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

__all__ = ["PlannedSite", "SiteParameters", "bind_connection", "bound_names", "planned_sites"]


@dataclass(frozen=True, eq=False)
class PlannedSite:
    """A site with what the plan and the options decide for it.

    Attributes:
        site: the site.
        index: its position in its chain.
        last: whether it ends the chain.
        options: those that hold for its path.
        dtype: of its parameters: float64 for a float64 trunk, else float32.
    """

    site: Site
    index: int
    last: bool
    options: ResolvedOptions

    @property
    def value(self) -> torch.Tensor:
        """The example value of the site's sum."""
        value = tensor_value(self.site.add)
        assert value is not None
        return value

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the site's parameters."""
        return parameter_dtype(self.value)


def planned_sites(plan: Plan, options: ResolvedOptions) -> tuple[PlannedSite, ...]:
    """Return the sites of a plan, chain by chain, each with its options."""
    return tuple(
        PlannedSite(site, index, site is chain.sites[-1], options.at(site.path))
        for chain in plan.chains
        for index, site in enumerate(chain.sites)
    )


class SiteParameters(ABC):
    """Where the parameters of the sites of one graph are, or will be."""

    @abstractmethod
    def existing(self, planned: PlannedSite) -> HyperConnection | None:
        """Return the hyper-connection that the site has already. It may have shapes alone.

        Raises:
            AttachError: its owner has something else called `mhc`, or a hyper-connection that
                contradicts the options.
        """

    @abstractmethod
    def bind(self, planned: PlannedSite) -> Binding:
        """Return the parameters of a site that was not rejected, made if need be."""

    def path(self, planned: PlannedSite) -> str:
        """Return what identifies the hyper-connection: sites of one path share it."""
        return planned.site.path

    def rejections(self, planned: tuple[PlannedSite, ...]) -> dict[Node, Rejection]:
        """Reject sites that cannot have the parameters at their path, because these serve another width."""
        widths: dict[str, int] = {}
        rejected: dict[Node, Rejection] = {}
        for one in planned:
            connection = self.existing(one)
            width = connection.width if connection is not None else widths.setdefault(self.path(one), one.site.width)
            if width != one.site.width:
                rejected[one.site.add] = _width_conflict(one.site, width)
        return rejected

    def resolve(self, planner: Planner, options: ResolvedOptions) -> tuple[PlannedSite, ...]:
        """Plan until every site of the plan can have its parameters.

        Return those sites; `planner.plan` is their plan.
        """
        return planned_sites(planner.settle(lambda plan: self.rejections(planned_sites(plan, options))), options)


def bound_names(connection: HyperConnection) -> list[str]:
    """The parameters of a hyper-connection and of its read-out, by name: ["phi", "bias", "scale", "read_out.weight", ...]."""
    read_out = connection.read_out
    return [*connection.names, *(f"read_out.{name}" for name in (read_out.names if read_out is not None else ()))]


def bind_connection(connection: HyperConnection, find: Callable[[str], Node | str | None]) -> Binding | None:
    """Return what a pass needs to know of a hyper-connection.

    Args:
        connection: whose settings count.
        find: gives the graph input, or the path of an attribute, that is the parameter of this
            name; None where the graph does not have it.

    Returns:
        The binding; None where the graph lacks a parameter.
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
