"""Hyper-connections on a model: who owns their parameters, how a tracer sees them, and how they come off again.

The parameters of a site are a submodule `mhc.<branch>` of the module that performs the residual add: `h.0.mhc.attn.phi`. So `parameters()`,
`state_dict`, `to`, EMA and `deepcopy` treat them like the block's own.

A compiler backend cannot give a graph new inputs. The module that ends the branch (`h.0.attn`, the carrier) therefore gets a forward pre-hook that
calls the no-op `mhc::declare` on the parameters: whoever traces the carrier lifts them as inputs of its graph. The carrier is called inside the
graph even where the block itself is the compiled function, whose own hooks run outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile._torch import OptimizedModule
from mhc_compile._warn import warn
from mhc_compile.connection import HyperConnection
from mhc_compile.errors import AttachError
from mhc_compile.optimizers import expect

if TYPE_CHECKING:
    from mhc_compile.options import Options
    from mhc_compile.passes import Site

__all__ = ["HyperConnections", "attach_site", "connections", "detach", "find_connection", "unwrap"]

#: Name of the submodule that holds a module's hyper-connections.
CONTAINER = "mhc"
#: A carrier's tuple of the hyper-connections it declares. Not a submodule: each has one owner, and it is not the carrier.
DECLARED = "_mhc_declared"
#: The handle of the carrier's hook.
HOOK = "_mhc_hook"


class HyperConnections(nn.Module):
    """The hyper-connections of one module, by the name of the branch; a dotted name is a path of nested containers."""

    def get(self, name: str) -> HyperConnection | None:
        """The hyper-connection called `name`, None if there is none."""
        module: nn.Module | None = self
        for part in name.split("."):
            module = module._modules.get(part) if module is not None else None
        return module if isinstance(module, HyperConnection) else None

    def put(self, name: str, connection: HyperConnection) -> None:
        """Adds `connection` under `name`."""
        *parents, last = name.split(".")
        module: nn.Module = self
        for part in parents:
            child = module._modules.get(part)
            if child is None:
                child = HyperConnections()
                module.add_module(part, child)
            module = child
        module.add_module(last, connection)


def _declare(carrier: nn.Module, args: Any) -> None:  # noqa: ARG001 - the signature of a forward pre-hook
    if torch.compiler.is_compiling():
        for connection in carrier._mhc_declared:  # type: ignore[union-attr]
            torch.ops.mhc.declare(connection.phi, connection.bias, connection.scale)
    else:
        warn(
            "a model with hyper-connections ran outside a graph compiled by backend='mhc': here it computed plain residual adds."
            " Call the compiled model, with options={'inner': 'eager'} to debug it, or take the hyper-connections off with"
            " mhc_compile.detach(model)"
        )


def find_connection(owner: nn.Module, site: Site) -> HyperConnection | None:
    """The hyper-connection of `site`, if its owner has one.

    Raises:
        AttachError: the owner has a `mhc` of its own.
    """
    container = getattr(owner, CONTAINER, None)
    if container is None:
        return None
    if not isinstance(container, HyperConnections):
        raise AttachError(
            f"{site}: module {site.owner.path or type(owner).__name__!r} already has an attribute 'mhc' ({type(container).__name__});"
            " hyper-connections need that name. Rename the attribute, or compile the model with another backend"
        )
    return container.get(site.name)


def attach_site(owner: nn.Module, carrier: nn.Module, site: Site, options: Options, *, index: int) -> bool:
    """Gives `site` its parameters and its declaration. Returns whether anything was missing.

    Args:
        owner: the module that performs the add.
        carrier: the module whose call declares the parameters.
        site: the site.
        options: number of streams, mapping, start; checked against a hyper-connection that exists already.
        index: position of the site in its chain.

    Raises:
        AttachError: the owner has a hyper-connection for the site that contradicts the options.
    """
    connection = find_connection(owner, site)
    changed = False
    if connection is None:
        connection = _create(owner, site, options, index)
        changed = True
    _check(connection, site, options)
    return declare(carrier, connection) or changed


def declare(carrier: nn.Module, connection: HyperConnection) -> bool:
    """Makes every call of `carrier` show the parameters of `connection` to the tracer. Returns whether it did not yet."""
    declared: tuple[HyperConnection, ...] = carrier.__dict__.get(DECLARED, ())
    if any(known is connection for known in declared):
        return False
    carrier.__dict__[DECLARED] = (*declared, connection)
    if HOOK not in carrier.__dict__:
        carrier.__dict__[HOOK] = carrier.register_forward_pre_hook(_declare)
    return True


def container_of(owner: nn.Module) -> HyperConnections:
    """The container of a module's hyper-connections, made if there is none. What else may be called `mhc`, `find_connection` has refused."""
    container = owner._modules.get(CONTAINER)
    if container is None:
        container = HyperConnections()
        owner.add_module(CONTAINER, container)
    assert isinstance(container, HyperConnections)
    return container


def _create(owner: nn.Module, site: Site, options: Options, index: int) -> HyperConnection:
    value: Tensor = site.add.meta["example_value"]
    connection = HyperConnection(
        site.width,
        options,
        index=index,
        device=value.device,
        dtype=torch.float64 if value.dtype == torch.float64 else torch.float32,
    )
    container = container_of(owner)
    container.put(site.name, connection)
    container.train(owner.training)
    expect(connection, owner, options.optimizer)
    return connection


def _check(connection: HyperConnection, site: Site, options: Options) -> None:
    for name in ("streams", "mapping"):
        has, wants = getattr(connection, name), getattr(options, name)
        if has != wants:
            raise AttachError(
                f"{site}: its hyper-connection has {name}={has!r}, the options say {name}={wants!r}."
                f" Compile with {name}={has!r}, or call mhc_compile.detach(model) first"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)`; any other model as it is."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def connections(model: nn.Module) -> dict[str, HyperConnection]:
    """Every hyper-connection of `model` by its path, in the order of `named_modules`: {"transformer.h.0.mhc.attn": ...}."""
    return {name: module for name, module in unwrap(model).named_modules() if isinstance(module, HyperConnection)}


def detach(model: nn.Module) -> int:
    """Takes every hyper-connection off: parameters, hooks and declarations. The model is the plain one again.

    A compiled version of it that is called again attaches new ones, as its first call did: they start afresh, and nothing of the old ones is used.
    An optimizer keeps the parameters that it has; build another one.

    Returns:
        How many hyper-connections were taken off.
    """
    target = unwrap(model)
    count = len(connections(target))
    for module in list(target.modules()):
        if isinstance(module._modules.get(CONTAINER), HyperConnections):
            del module._modules[CONTAINER]
        module.__dict__.pop(DECLARED, None)
        hook = module.__dict__.pop(HOOK, None)
        if hook is not None:
            hook.remove()
    return count
