"""Hyper-connections on a model: who owns their parameters, how a tracer sees them, and how they come off again.

The parameters of a site are a submodule `mhc.<branch>` of the module that performs the residual add: `h.0.mhc.attn.phi`. So `parameters()`,
`state_dict`, `to`, EMA and `deepcopy` treat them like the block's own.

A compiler backend cannot give a graph new inputs. The module that ends the branch (`h.0.attn`, the carrier) therefore gets a forward pre-hook that
calls the no-op `mhc::declare` on the parameters: whoever traces the carrier lifts them as inputs of its graph. The carrier is called inside the
graph even where the block itself is the compiled function, whose own hooks run outside.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile._torch import child_module, original_module
from mhc_compile._warn import warn
from mhc_compile.attachment.optimizers import expect, leave
from mhc_compile.errors import AttachError
from mhc_compile.modules.gated import create_connection
from mhc_compile.modules.hyper_connection import HyperConnection, parameter_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.passes import Site

__all__ = [
    "HyperConnections",
    "attach_like",
    "attach_site",
    "begin_branch",
    "begun_by",
    "connections",
    "declare_on",
    "detach",
    "find_connection",
    "put_connection",
    "unwrap",
]

#: Name of the submodule that holds a module's hyper-connections.
CONTAINER = "mhc"
#: A carrier's tuple of the hyper-connections it declares. Not a submodule: each has one owner, and it is not the carrier.
DECLARED = "_mhc_declared"
#: A module's tuple of the hyper-connections whose branch it begins in one graph, where the branch ends in another, each with the name of its site.
BEGUN = "_mhc_begun"
#: The handle of the carrier's hook.
HOOK = "_mhc_hook"
#: Where the second face of a model, made by `mhc_compile.eager`, has the model itself.
BEHIND = "_mhc_behind"

#: Carriers of models that ran without streams and were warned about.
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class HyperConnections(nn.Module):
    """The hyper-connections of one module, by the name of the branch; a dotted name is a path of nested containers."""

    def get(self, name: str) -> HyperConnection | None:
        """The hyper-connection called `name`, None if there is none."""
        module: nn.Module | None = self
        for part in name.split("."):
            module = child_module(module, part) if module is not None else None
        return module if isinstance(module, HyperConnection) else None

    def put(self, name: str, connection: HyperConnection) -> None:
        """Adds `connection` under `name`."""
        *parents, last = name.split(".")
        module: nn.Module = self
        for part in parents:
            child = child_module(module, part)
            if child is None:
                child = HyperConnections()
                module.add_module(part, child)
            module = child
        module.add_module(last, connection)


def _declare(declaring_module: nn.Module, args: Any) -> None:  # noqa: ARG001 - the signature of a forward pre-hook
    if torch.compiler.is_compiling():
        for connection in declaring_module._mhc_declared:  # type: ignore[union-attr]
            for module in (connection, connection.read_out):
                if module is not None:
                    torch.ops.mhc.declare(*(getattr(module, name) for name in module.names))
    elif declaring_module not in _told:
        _tell(declaring_module)


def _tell(declaring_module: nn.Module) -> None:
    """Warns that the running model drops its streams, once for the whole model."""
    model = _running(declaring_module)
    _told.update(module for module in model.modules() if HOOK in module.__dict__)
    warn(
        f"{type(model).__name__} has hyper-connections and ran outside a graph compiled by backend='mhc': here it computed plain residual adds."
        " Call what torch.compile returned, or model.compile(backend='mhc') where a method such as generate calls the model itself."
        " mhc_compile.eager(model) runs the hyper-connections without compiling, mhc_compile.detach(model) takes them off",
        repeat=True,
    )


def _running(declaring_module: nn.Module) -> nn.Module:
    """The outermost module whose call is under way and that has `carrier` in it."""
    model, frame = declaring_module, sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if (
            isinstance(caller, nn.Module)
            and caller is not model
            and any(module is model for module in caller.modules())
        ):
            model = caller
    return model


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


def attach_site(
    owner: nn.Module,
    declaring_module: nn.Module,
    site: Site,
    options: ResolvedOptions,
    *,
    index: int,
    last: bool = False,
    root: nn.Module | None = None,
) -> bool:
    """Gives `site` its parameters and its declaration. Returns whether anything was missing.

    Args:
        owner: the module that performs the add.
        carrier: the module whose call declares the parameters.
        site: the site.
        options: number of streams, mapping, start; checked against a hyper-connection that exists already.
        index: position of the site in its chain.
        last: whether it is the last one there, and may have a learned read-out.
        root: the module that is traced, if it is one.

    Raises:
        AttachError: the owner has a hyper-connection for the site that contradicts the options.
    """
    connection = find_connection(owner, site)
    options = options.at(site.path)
    changed = False
    if connection is None:
        connection = _create(owner, site, options, index, root, last=last)
        changed = True
    _check(connection, site, options)
    if last and connection.end_chain():
        expect(connection, owner, options.existing_optimizers, root=root, path=site.owner.path)
        changed = True
    if site.tail:
        modules = [module for head in site.heads for module in head.alive()]
        return begin_branch(modules, connection, site.name) or changed
    return declare_on(declaring_module, connection) or changed


def begin_branch(modules: Sequence[nn.Module], connection: HyperConnection, name: str) -> bool:
    """Tells `modules` that they begin the branch of a site called `name` in a graph of their own. Returns whether they did not know."""
    changed = False
    for module in modules:
        begun: tuple[tuple[str, HyperConnection], ...] = module.__dict__.get(BEGUN, ())
        if not any(known is connection for _, known in begun):
            module.__dict__[BEGUN] = (*begun, (name, connection))
            changed = True
    return (bool(modules) and declare_on(modules[0], connection)) or changed


def begun_by(modules: Sequence[nn.Module | None]) -> tuple[str, HyperConnection] | None:
    """The one site whose branch all of `modules` begin, with its name; None if there is none."""
    sites = [module.__dict__.get(BEGUN, ()) if module is not None else () for module in modules]
    common = [site for site in sites[0] if all(any(site[1] is other for _, other in more) for more in sites[1:])]
    return common[0] if len(common) == 1 else None


def attach_like(root: nn.Module, like: nn.Module, site: Site, options: ResolvedOptions, *, index: int) -> None:
    """Gives `root` a hyper-connection where `site`, found in the block `like`, is. Does nothing where the blocks differ after all."""
    try:
        owner, declaring_module = root.get_submodule(site.owner.path), root.get_submodule(site.declaring_module.path)
    except AttributeError:
        return
    connection = find_connection(owner, site)
    if connection is not None and connection.width != site.width:
        return
    attach_site(owner, declaring_module, replace(site, heads=()), options, index=index, root=root)
    connection = find_connection(owner, site)
    assert connection is not None
    if site.tail:
        paths = {id(module): path for path, module in like.named_modules()}
        modules = [module for head in site.heads for module in head.alive()]
        begin_branch([root.get_submodule(paths[id(module)]) for module in modules], connection, site.name)


def declare_on(declaring_module: nn.Module, connection: HyperConnection) -> bool:
    """From now on calls of `carrier` declare `connection` to a tracer. Returns whether they did not before."""
    declared: tuple[HyperConnection, ...] = declaring_module.__dict__.get(DECLARED, ())
    if any(known is connection for known in declared):
        return False
    declaring_module.__dict__[DECLARED] = (*declared, connection)
    if HOOK not in declaring_module.__dict__:
        declaring_module.__dict__[HOOK] = declaring_module.register_forward_pre_hook(_declare)
    return True


def container_of(owner: nn.Module) -> HyperConnections:
    """The container of a module's hyper-connections, made if there is none. What else may be called `mhc`, `find_connection` has rejected."""
    container = child_module(owner, CONTAINER)
    if container is None:
        container = HyperConnections()
        owner.add_module(CONTAINER, container)
    assert isinstance(container, HyperConnections)
    return container


def _create(
    owner: nn.Module, site: Site, options: ResolvedOptions, index: int, root: nn.Module | None, *, last: bool
) -> HyperConnection:
    value: Tensor = site.add.meta["example_value"]
    device = next((parameter.device for parameter in owner.parameters()), value.device)
    connection = create_connection(
        site.width,
        options,
        index=index,
        last=last,
        device=device,
        dtype=parameter_dtype(value),
    )
    put_connection(owner, site.name, connection, options, root=root, path=site.owner.path)
    return connection


def put_connection(
    owner: nn.Module,
    name: str,
    connection: HyperConnection,
    options: ResolvedOptions,
    *,
    root: nn.Module | None,
    path: str,
) -> None:
    """Makes `connection` a submodule of its owner, the module `path` of `root`, and has optimizers that were built before told of it."""
    container = container_of(owner)
    container.put(name, connection)
    container.train(owner.training)
    expect(connection, owner, options.existing_optimizers, root=root, path=path)


def _check(connection: HyperConnection, site: Site, options: ResolvedOptions) -> None:
    for name in ("streams", "preset", "mapping", "token_dependent", "rank", "single_pass", "read_out"):
        has, wants = getattr(connection, "end" if name == "read_out" else name), getattr(options, name)
        if has != wants:
            raise AttachError(
                f"{site}: its hyper-connection has {name}={has!r}, the options say {name}={wants!r}."
                f" Compile with {name}={has!r}, or call mhc_compile.detach(model) first"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)` and behind `mhc_compile.eager(model)`; any other model as it is."""
    model = original_module(model)
    return getattr(model, BEHIND, model)


def connections(model: nn.Module) -> dict[str, HyperConnection]:
    """Every hyper-connection of `model` by its path, in the order of `named_modules`: {"transformer.h.0.mhc.attn": ...}."""
    return {name: module for name, module in unwrap(model).named_modules() if isinstance(module, HyperConnection)}


def detach(model: nn.Module) -> int:
    """Takes every hyper-connection off: parameters, hooks and declarations. The model is the plain one again.

    Optimizers that trained the parameters forget them, and their state. A compiled version of the model that is called again attaches new ones, as
    its first call did: they start afresh, and nothing of the old ones is used.

    Returns:
        How many hyper-connections were taken off.
    """
    target = unwrap(model)
    gone = connections(target)
    for module in list(target.modules()):
        if isinstance(child_module(module, CONTAINER), HyperConnections):
            delattr(module, CONTAINER)
        module.__dict__.pop(DECLARED, None)
        module.__dict__.pop(BEGUN, None)
        hook = module.__dict__.pop(HOOK, None)
        if hook is not None:
            hook.remove()
            _told.discard(module)
    if gone:
        leave(parameter for connection in gone.values() for parameter in connection.parameters())
    return len(gone)
