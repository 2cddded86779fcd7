"""The place of hyper-connections in a model: submodule `mhc.<branch>` of the owner of the add.

`parameters()`, `state_dict`, `to`, EMA and `deepcopy` thus include `h.0.mhc.attn.phi`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from mhc_compile import _torch
from mhc_compile.errors import AttachError
from mhc_compile.modules.hyper_connection import HyperConnection

if TYPE_CHECKING:
    from mhc_compile.passes import Site

#: Name of the submodule that holds a module's hyper-connections.
CONTAINER = "mhc"
#: Attribute of a module that is compiled in place.
IN_PLACE = "_mhc_in_place"
#: Attribute of a module made by `mhc_compile.eager` that holds the model itself.
BEHIND = "_mhc_behind"


class HyperConnections(nn.Module):
    """The hyper-connections of one module by branch name; a dotted name is a path of containers."""

    def get(self, name: str) -> HyperConnection | None:
        """Return the hyper-connection called `name`, or None."""
        module: nn.Module | None = self
        for part in name.split("."):
            module = dict(module.named_children()).get(part) if module is not None else None
        return module if isinstance(module, HyperConnection) else None

    def put(self, name: str, connection: HyperConnection) -> None:
        """Add `connection` under `name`."""
        *parents, last = name.split(".")
        module: nn.Module = self
        for part in parents:
            child = dict(module.named_children()).get(part)
            if child is None:
                child = HyperConnections()
                module.add_module(part, child)
            module = child
        module.add_module(last, connection)


def find_connection(owner: nn.Module, site: Site) -> HyperConnection | None:
    """Return the hyper-connection of `site`, or None.

    Raises:
        AttachError: the owner has another attribute `mhc`.
    """
    container = getattr(owner, CONTAINER, None)
    if container is None:
        return None
    if not isinstance(container, HyperConnections):
        raise AttachError(
            f"{site}: module {site.owner.path or type(owner).__name__!r} already has an attribute 'mhc'"
            f" ({type(container).__name__}); hyper-connections need that name. Rename the attribute, or compile the"
            " model with another backend"
        )
    return container.get(site.name)


def container_of(owner: nn.Module) -> HyperConnections:
    """Return the container of a module's hyper-connections, created if missing."""
    container = getattr(owner, CONTAINER, None)
    if container is None:
        container = HyperConnections()
        owner.add_module(CONTAINER, container)
    assert isinstance(container, HyperConnections)  # `find_connection` rejects anything else
    return container


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model in `torch.compile(model)` or `mhc_compile.eager(model)`, else `model`."""
    model = _torch.original_module(model)
    return getattr(model, BEHIND, model)


def connections(model: nn.Module) -> dict[str, HyperConnection]:
    """Return the hyper-connections of `model` by path: {"transformer.h.0.mhc.attn": ...}."""
    return {name: module for name, module in unwrap(model).named_modules() if isinstance(module, HyperConnection)}


def plain_name(name: str) -> str:
    """Return the name of a parameter or module without the names of wrappers.

    Those are the `_orig_mod` of `torch.compile` and the one of `checkpoint_wrapper`.
    """
    return ".".join(part for part in name.split(".") if part not in _torch.WRAPPED_ATTRIBUTES)


def split_path(path: str) -> tuple[str, str]:
    """Split the path of a hyper-connection: ("h.0", "attn") of "h.0.mhc.attn"."""
    parts = plain_name(path).split(".")
    cut = parts.index(CONTAINER)
    return ".".join(parts[:cut]), ".".join(parts[cut + 1 :])


def find_module(model: nn.Module, path: str, place: str) -> nn.Module:
    """Return the module at `path`, through wrappers on the way.

    Raises:
        AttachError: there is none; `place` is the hyper-connection that needs it.
    """
    module = unwrap(model)
    for step in path.split(".") if path else ():
        try:
            module = _torch.without_wrappers(module.get_submodule(step))
        except AttributeError:
            raise AttachError(
                f"{place}: a hyper-connection belongs there, but {type(unwrap(model)).__name__} has no module {path!r}."
                " Build the model that was saved"
            ) from None
    return module


def can_be_called(module: nn.Module) -> bool:
    """Return whether a module has a forward, as a `ModuleList` has not."""
    return type(module).forward is not nn.Module.forward
