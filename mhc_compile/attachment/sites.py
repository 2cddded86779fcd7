"""Attach hyper-connections to the modules of a model, and take them off."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mhc_compile.attachment.declaration import begin_branch, declare_on, remove_declarations
from mhc_compile.attachment.model_tree import (
    CONTAINER,
    IN_PLACE,
    HyperConnections,
    connections,
    container_of,
    find_connection,
    split_path,
    unwrap,
)
from mhc_compile.attachment.optimizer_groups import leave
from mhc_compile.attachment.optimizers import expect
from mhc_compile.errors import AttachError
from mhc_compile.modules.gated import create_connection

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.passes import Site

#: Settings in which an existing hyper-connection and the options must agree, if these have one.
_FIXED = (
    "streams", "preset", "mapping", "token_dependent", "rank", "single_pass", "read_out", "gate_speed", "scale_speed",
)  # fmt: skip


def attach_site(
    owner: nn.Module,
    declaring_module: nn.Module,
    site: Site,
    options: ResolvedOptions,
    *,
    index: int,
    dtype: torch.dtype,
    last: bool = False,
    root: nn.Module | None = None,
) -> bool:
    """Give `site` its parameters and its declaration. Return True if anything was missing.

    The owner performs the add; a call of the declaring module declares the parameters. `index` is
    the position in the chain, over all equivalent blocks. The `last` site may get a read-out.

    Raises:
        AttachError: the owner has a hyper-connection for the site that contradicts the options.
    """
    connection = find_connection(owner, site)
    changed = connection is None
    devices = [parameter.device for parameter in owner.parameters()]
    if connection is None:
        device = next(iter(devices), site.add.meta["example_value"].device)
        connection = create_connection(site.width, options, index=index, last=last, device=device, dtype=dtype)
        put_connection(owner, site.name, connection, options, root=root, path=site.owner.path)
    elif any(parameter.is_meta for parameter in connection.parameters()):
        real = [device for device in devices if device.type != "meta"]
        if real:  # a checkpoint of the plain model has materialized the owner alone
            connection.leave_meta(real[0])
            expect(connection, owner, options.existing_optimizers, root=root, path=site.owner.path)
            changed = True
    check_options(connection, site, options)
    if last and connection.end_chain():
        expect(connection, owner, options.existing_optimizers, root=root, path=site.owner.path, strict=options.strict)
        changed = True
    if site.tail:
        modules = [module for head in site.heads for module in head.alive()]
        return begin_branch(modules, connection, site.name) or changed
    return declare_on(declaring_module, connection) or changed


def attach_like(
    root: nn.Module, like: nn.Module, site: Site, options: ResolvedOptions, *, index: int, dtype: torch.dtype
) -> None:
    """Give `root` a hyper-connection in the place of `site` in the block `like`, if it has one."""
    try:
        owner, declaring_module = root.get_submodule(site.owner.path), root.get_submodule(site.declaring_module.path)
    except AttributeError:
        return
    connection = find_connection(owner, site)
    if connection is not None and connection.width != site.width:
        return
    attach_site(owner, declaring_module, replace(site, heads=()), options, index=index, dtype=dtype, root=root)
    if site.tail:
        modules = [module for head in site.heads for module in head.alive()]
        mine = find_connection(like.get_submodule(site.owner.path), site)
        assert mine is not None
        begin_like(root, like, modules, mine)


def begin_like(root: nn.Module, like: nn.Module, modules: Iterable[nn.Module], connection: HyperConnection) -> None:
    """Let modules of `root` start the branch that `modules` of the equivalent `like` start."""
    paths = {id(module): path for path, module in like.named_modules()}
    path = paths[id(connection)]
    other = dict(root.named_modules()).get(path)
    if isinstance(other, type(connection)):
        starting = [root.get_submodule(paths[id(module)]) for module in modules]
        begin_branch(starting, other, split_path(path)[1])


def put_connection(
    owner: nn.Module,
    name: str,
    connection: HyperConnection,
    options: ResolvedOptions,
    *,
    root: nn.Module | None,
    path: str,
) -> None:
    """Add `connection` to its owner, the module `path` of `root`, and to existing optimizers."""
    container = container_of(owner)
    container.put(name, connection)
    container.train(owner.training)
    expect(connection, owner, options.existing_optimizers, root=root, path=path, strict=options.strict)


def check_options(connection: HyperConnection, site: Site, options: ResolvedOptions) -> None:
    """Raise AttachError if the hyper-connection of a site contradicts the options."""
    for name in _FIXED:
        has, wants = getattr(connection, "end" if name == "read_out" else name), getattr(options, name)
        if wants is not None and has != wants:
            raise AttachError(
                f"{site}: its hyper-connection has {name}={has!r}, the options say {name}={wants!r}."
                f" Compile with {name}={has!r}, or call mhc_compile.detach(model) first"
            )


def detach(model: nn.Module) -> int:
    """Remove all hyper-connections, hooks and declarations. Return how many there were.

    The model is the plain one again, and optimizers forget the parameters and their state. A
    compiled version that is called again attaches new hyper-connections, at their init.
    """
    target = unwrap(model)
    gone = connections(target)
    for module in list(target.modules()):
        if isinstance(dict(module.named_children()).get(CONTAINER), HyperConnections):  # a wrapper would forward
            delattr(module, CONTAINER)
        in_place = module.__dict__.pop(IN_PLACE, None)
        if in_place is not None:
            in_place.remove()
        remove_declarations(module)
    if gone:
        leave(parameter for connection in gone.values() for parameter in connection.parameters())
    return len(gone)
