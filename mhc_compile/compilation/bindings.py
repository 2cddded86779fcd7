"""From the parameters of a hyper-connection to what the passes write into a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.config.coefficient_spec import parse
from mhc_compile.passes.transforms.stream_builder import Binding, End

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Node

    from mhc_compile.modules.hyper_connection import HyperConnection

__all__ = ["bind_connection", "bound_names"]


def bound_names(connection: HyperConnection) -> list[str]:
    """The parameters of a hyper-connection and of its read-out, by name: ["phi", "bias", "scale", "read_out.weight", ...]."""
    read_out = connection.read_out
    return [*connection.names, *(f"read_out.{name}" for name in (read_out.names if read_out is not None else ()))]


def bind_connection(connection: HyperConnection, find: Callable[[str], Node | str | None]) -> Binding | None:
    """What a pass needs to know of a hyper-connection.

    Args:
        connection: whose settings count.
        find: gives the graph input, or the path of an attribute, that is the parameter of this name; None where the graph does not have it.

    Returns:
        The binding; None where a parameter is not to be had.
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
