"""Models that are wrapped for distributed training already: what comes too late for them, and how that is said.

DDP and FSDP find the parameters of a model when they wrap it. Parameters that are attached afterwards would be trained on every rank by that rank's
own gradients, and the ranks would drift apart without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.parallel import DistributedDataParallel

from mhc_compile import _torch
from mhc_compile.errors import AttachError

if TYPE_CHECKING:
    from torch import nn

    from mhc_compile.connection import HyperConnection
    from mhc_compile.passes import Site

__all__ = ["check_site", "check_unwrapped", "known_to_ddp"]

_WAY_OUT = (
    "Call mhc_compile.attach(model, inputs) first, in the same way on every rank, and wrap the model then; the compiled call finds the"
    " hyper-connections"
)


def known_to_ddp() -> set[int] | None:
    """`id` of every parameter that the `DistributedDataParallel` round the model being traced takes care of; None if there is none."""
    ddp = _torch.caller(DistributedDataParallel)
    return None if ddp is None else _torch.ddp_parameters(ddp)


def check_site(site: Site, owner: nn.Module, connection: HyperConnection | None, known: set[int] | None) -> None:
    """Refuses parameters that the wrapper round the model being traced does not know, before any are made.

    Args:
        site: the site.
        owner: the module that performs it.
        connection: its hyper-connection, None where it has none yet.
        known: what `known_to_ddp` says.

    Raises:
        AttachError: the model runs inside DDP, and DDP was built before `connection`; or FSDP manages `owner`, and there is no `connection`.
    """
    if known is not None:
        if connection is None or any(id(parameter) not in known for parameter in connection.parameters()):
            raise AttachError(
                f"{site}: DistributedDataParallel wrapped the model before its hyper-connections were attached, and would not average"
                f" their gradients. {_WAY_OUT}"
            )
    elif connection is None and _torch.is_sharded(owner):
        raise AttachError(
            f"{site}: fully_shard was applied to {type(owner).__name__!r} before its hyper-connections were attached, and would neither shard"
            f" them nor reduce their gradients. {_WAY_OUT}"
        )


def check_unwrapped(model: nn.Module) -> None:
    """Refuses to attach to a model that DDP or FSDP has wrapped.

    Raises:
        AttachError: with the path of the wrapped module.
    """
    for path, module in model.named_modules():
        ddp = isinstance(module, DistributedDataParallel)
        if ddp or _torch.is_sharded(module):
            where = f"its module {path!r}" if path else "it"
            wrapper = "wrapped in DistributedDataParallel" if ddp else "sharded by FSDP"
            raise AttachError(
                f"mhc_compile.attach cannot attach to {type(model).__name__}: {where} is {wrapper} already, which knows only the parameters"
                f" that it found then. {_WAY_OUT}"
            )
