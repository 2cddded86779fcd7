"""Hyper-connections that a model gets after `DistributedDataParallel` wrapped it.

DDP averages the gradients of the parameters that it found when it was built. Where a script wraps
its model before the first compiled call, DDP learns of the others at the end of the first training
forward after they were attached. Rank 0 may attach alone before, in a validation.
"""

from __future__ import annotations

import datetime
import gc
import json
import weakref
import zlib
from collections import Counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mhc_compile import _torch
from mhc_compile.errors import AttachError, warn
from mhc_compile.modules.state_dict import LoadsPartially

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

#: How long a rank waits for the others to attach, before a warning and before an error.
SOON, LATEST = datetime.timedelta(minutes=1), datetime.timedelta(minutes=30)
#: How often the ranks of a group have agreed.
_rounds: Counter[str] = Counter()
#: Hyper-connections whose wrappers were looked for.
_looked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def wrappers_of(owners: Iterable[nn.Module], connections: Iterable[nn.Module | None]) -> list[DistributedDataParallel]:
    """Return every `DistributedDataParallel` that one of `owners` is inside.

    For a call outside DDP. `connections` are those of the owners; once all are known, nothing is
    searched, and the list is empty.
    """
    new = [one for one in connections if one is None or one not in _looked]
    if not new or not dist.is_available() or not dist.is_initialized():
        return []
    _looked.update(one for one in new if one is not None)
    wanted = {id(owner) for owner in owners}
    # `vars`: a half-built one has no modules yet
    found = [
        one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel) and "reducer" in vars(one)
    ]
    return [ddp for ddp in found if not wanted.isdisjoint(map(id, ddp.modules()))]


def parts(wrappers: Iterable[DistributedDataParallel]) -> set[nn.Module]:
    """Return the hyper-connections and read-outs inside `wrappers`."""
    return {part for ddp in wrappers for part in ddp.modules() if isinstance(part, LoadsPartially)}


def has_late(modules: Iterable[nn.Module], ddp: DistributedDataParallel) -> bool:
    """Return whether `modules` have parameters that `ddp` around them does not know."""
    late = {id(parameter) for parameter in _torch.late_parameters(ddp).values()}
    return any(id(parameter) in late for module in modules for parameter in module.parameters())


def follow(ddp: DistributedDataParallel, before: set[nn.Module]) -> None:
    """Make `ddp` average the gradients of hyper-connections that it does not know.

    Those that are not in `before` were created on every rank for itself. A random start is drawn
    again, from one seed for all ranks.
    """
    if not has_late(parts([ddp]), ddp):
        return
    for path, part in ddp.module.named_modules():
        if isinstance(part, LoadsPartially) and part.random_start and part not in before:
            seed = int(_torch.default_store().compare_set("mhc_compile/seed", "", str(torch.initial_seed())))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((seed + zlib.crc32(path.encode())) % 2**63)
                part.reset_parameters()
    _torch.before_backward(ddp, _adopt)


def _adopt(ddp: DistributedDataParallel) -> None:
    if not _torch.late_parameters(ddp):
        return
    obstacle = _torch.obstacle_to_late_parameters(ddp)
    if obstacle is not None:
        raise AttachError(explain(obstacle))
    _agree(ddp)
    _torch.reduce_late_parameters(ddp)


def explain(obstacle: str) -> str:
    """Return the sentence that an `obstacle` keeps DDP from late hyper-connections."""
    return (
        "DistributedDataParallel wrapped the model before its hyper-connections were attached, and cannot average"
        f" their gradients with {obstacle}"
    )


def _agree(ddp: DistributedDataParallel) -> None:
    """Wait until every rank is here, and compare the parameters.

    By the store, not by a collective operation: a rank that has not attached is in another one.

    Raises:
        AttachError: a rank has attached other hyper-connections, or none for a long time.
    """
    ranks = dist.get_process_group_ranks(ddp.process_group)
    if len(ranks) == 1:
        return
    store, me, group = _torch.default_store(), dist.get_rank(), "-".join(map(str, ranks))
    keys = {rank: f"mhc_compile/attached/{group}/{_rounds[group]}/{rank}" for rank in ranks}
    mine = {name: list(parameter.shape) for name, parameter in _torch.late_parameters(ddp).items()}
    digest = f"mhc_compile/parameters/{zlib.crc32(json.dumps(mine).encode())}"
    store.set(digest, json.dumps(mine))
    store.set(keys[me], digest)
    for limit in (SOON, LATEST):
        try:
            store.wait(list(keys.values()), limit)
            break
        except RuntimeError as error:  # not every store has a kind of error for it
            missing = [rank for rank, key in keys.items() if not store.check([key])]
            message = (
                f"rank {me} has attached hyper-connections to {type(ddp.module).__name__} and waited {limit} for ranks"
                f" {missing} to do so: every rank must run the compiled model in training"
            )
            if limit is LATEST:
                store.delete_key(keys[me])
                raise AttachError(message) from error
            warn(message)
    _rounds[group] += 1
    for rank, value in zip(ranks, store.multi_get(list(keys.values())), strict=True):
        if value.decode() != digest:
            theirs = json.loads(store.get(value.decode()))
            differing = (name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name))
            name = next(differing, "their order")
            raise AttachError(
                f"rank {me} attached {len(mine)} parameters of hyper-connections, rank {rank} {len(theirs)}; the first"
                f" that differs is {name!r}, {mine.get(name)} and {theirs.get(name)}. Expected the same on every rank,"
                " from the same model, options and graph breaks"
            )
