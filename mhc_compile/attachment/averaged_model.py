"""Give hyper-connections to averaged copies that were made before a model got them.

`torch.optim.swa_utils.AveragedModel` pairs parameters by position without comparing their number,
so a copy made before attaching would be paired wrongly. Torch has no hook before an update,
therefore the method is wrapped.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from mhc_compile import _torch
from mhc_compile.attachment.declaration import BEGUN, DECLARED, begin_branch, declare_on
from mhc_compile.attachment.model_tree import CONTAINER, HyperConnections, connections, container_of, unwrap
from mhc_compile.errors import AttachError
from mhc_compile.modules.hyper_connection import HyperConnection

if TYPE_CHECKING:
    from torch import nn
    from torch.optim.swa_utils import AveragedModel


def follow_averages() -> None:
    """Complete averaged copies at their next update, where their hyper-connections start."""
    _torch.before_averaging(_complete)


def _complete(averaged: AveragedModel, model: nn.Module) -> None:
    """Copy to `averaged`, an earlier copy of `model`, the hyper-connections that it lacks."""
    has, wants = connections(averaged.module), connections(model)
    if len(has) > len(wants):
        raise AttachError(
            f"AveragedModel has {len(has)} hyper-connections and {type(unwrap(model)).__name__} has {len(wants)}: they"
            " were taken off after the averaged copy was made. Call mhc_compile.detach(averaged.module) too"
        )
    if len(has) == len(wants):
        return
    pairs = _pairs(model, averaged.module)
    copies: dict[HyperConnection, HyperConnection] = {}
    for owner, other in pairs:
        container = getattr(owner, CONTAINER, None)
        if not isinstance(container, HyperConnections):
            continue
        theirs = container_of(other)
        for name, connection in container.named_modules():
            if isinstance(connection, HyperConnection):
                twin = theirs.get(name)
                if twin is None:
                    twin = _copy(connection, other)
                    theirs.put(name, twin)
                copies[connection] = twin
        theirs.train(other.training)
    for declaring_module, other in pairs:
        for connection in declaring_module.__dict__.get(DECLARED, ()):
            declare_on(other, copies[connection])
        for name, connection in declaring_module.__dict__.get(BEGUN, ()):
            begin_branch([other], copies[connection], name)


def _pairs(model: nn.Module, twin: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    ours = (HyperConnection, HyperConnections)
    mine, theirs = ([part for part in root.modules() if not isinstance(part, ours)] for root in (model, twin))
    # Wrappers (DDP, torch.compile) precede their module, and only one of the two may have one.
    length = min(len(mine), len(theirs))
    pairs = list(zip(mine[-length:], theirs[-length:], strict=True))
    if not all(type(one) is type(other) for one, other in pairs):
        raise AttachError(
            f"{type(unwrap(twin)).__name__} was averaged before hyper-connections were attached to"
            f" {type(unwrap(model)).__name__}, and has other modules: they cannot be given to it. Make the"
            " AveragedModel after mhc_compile.attach(model, ...)"
        )
    return pairs


def _copy(connection: HyperConnection, owner: nn.Module) -> HyperConnection:
    new = copy.deepcopy(connection)
    neighbour = next(owner.parameters(), None)
    if neighbour is not None:
        new.to(neighbour.device)
    for parameter in new.parameters():
        parameter.grad = None
    return new
