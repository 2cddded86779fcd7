"""Add the parameters of hyper-connections to optimizers that were built before, or without them.

Such an optimizer would silently train the model without them. So the parameters join it when they
are created, and gradient clipping and `GradScaler.unscale_` see them at the first step;
`optimizer_places.py` says where. A hook before each optimizer step handles optimizers that could
not be settled then. After the first steps, trained parameters that are still in no optimizer are a
warning, or an error with `strict`.

They never get a group of their own. Schedulers keep lists by group: after a new group most of
torch's stop with an error or set wrong rates, schedules written by hand often know only group 0,
and a checkpoint fixes the number of groups. The price: an optimizer with one decayed group decays
`bias` and `scale` as it does the model's biases. `mhc_compile.parameter_groups` avoids that. A
group that is added later with parameters that joined another one takes them over.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mhc_compile import _torch
from mhc_compile.attachment.captured_parameters import warn_of_copies, warn_of_lists
from mhc_compile.attachment.optimizer_groups import WAYS_OUT, Arrivals, move_out
from mhc_compile.attachment.optimizer_places import (
    decayed_by_name,
    find_places,
    misplaced,
    places_of,
    plain_parameters,
    scopes_of,
)
from mhc_compile.errors import AttachError, warn

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn
    from torch.optim import Optimizer

    from mhc_compile.config.options import ExistingOptimizers
    from mhc_compile.modules.hyper_connection import HyperConnection


class _Waiting(NamedTuple):
    owner: weakref.ref[nn.Module]
    root: weakref.ref[nn.Module]
    path: str
    policy: ExistingOptimizers
    strict: bool


#: Hyper-connections that no optimizer trains yet, held weakly. Every access is one atomic step,
#: because one thread may compile a model while another trains.
_waiting: weakref.WeakKeyDictionary[HyperConnection, _Waiting] = weakref.WeakKeyDictionary()
#: All hyper-connections that optimizers should train.
_known: weakref.WeakKeyDictionary[HyperConnection, _Waiting] = weakref.WeakKeyDictionary()
#: Optimizers whose groups were searched for parameters that they cannot train.
_searched: weakref.WeakSet[Optimizer] = weakref.WeakSet()
#: Hyper-connections that were warned of.
_warned: weakref.WeakSet[HyperConnection] = weakref.WeakSet()
#: Models whose lists and copies of parameters have not been looked for: at a call, at a step.
_unlisted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_uncopied: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: Optimizers seen before a step: `_expected` and their number of parameters at that time.
_seen: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()
#: Steps that were made while hyper-connections were waiting.
_steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_expected = 0
_hooked = False
_lock = threading.Lock()


def expect(
    connection: HyperConnection,
    owner: nn.Module,
    policy: ExistingOptimizers,
    *,
    root: nn.Module | None,
    path: str,
    strict: bool = False,
) -> None:
    """Apply `policy` to optimizers that train `owner` but not `connection`, from now on.

    `root`, which has the owner at `path`, gives the order within a group. With `strict`, parameters
    that get gradients and are in no optimizer after its first step are an error.
    """
    global _hooked, _expected
    if policy == "ignore":
        return
    with _lock:
        if not _hooked:
            register_optimizer_step_pre_hook(_before_step)
            register_optimizer_step_post_hook(_after_step)
            _torch.before_loading_state(_before_loading)
            _hooked = True
        _expected += 1
        _steps.clear()
    if root is None or not _is_at(owner, root, path):  # a function was traced, or several models
        paths = {module: name for name, module in root.named_modules()} if root is not None else {}
        root, path = (root, paths[owner]) if root is not None and owner in paths else (owner, "")
    _unlisted.add(root)
    _uncopied.add(root)
    _known[connection] = _waiting[connection] = _Waiting(weakref.ref(owner), weakref.ref(root), path, policy, strict)


def _is_at(owner: nn.Module, root: nn.Module, path: str) -> bool:
    try:
        return root.get_submodule(path) is owner
    except AttributeError:
        return False


def settle() -> None:
    """Add expected parameters with the policy "extend" to the existing optimizers.

    Raises:
        AttachError: an optimizer divides parameters among processes and has stepped, or, with
            `strict`, steps in the backward.
    """
    if _waiting:
        _settle(_torch.living_optimizers(), stepping=None)
    while _unlisted:
        warn_of_lists(_unlisted.pop())


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - the signature of a step hook
    # A compiled step is traced, and this with it.
    if torch.compiler.is_compiling():
        return
    _take_out(optimizer)
    if not (_waiting or _uncopied):
        return
    now = (_expected, sum(len(group["params"]) for group in optimizer.param_groups))
    if _seen.get(optimizer) == now:
        return
    _seen[optimizer] = now
    living = _living(optimizer)
    mine = places_of([optimizer])
    for root in list(_uncopied):
        if any(id(parameter) in mine for parameter in root.parameters()):
            _uncopied.discard(root)
            warn_of_copies(root, places_of(living))
    _settle(living, stepping=optimizer)


def _take_out(optimizer: Optimizer) -> None:
    """Take out of a new optimizer what it cannot train; it waits for another place."""
    if optimizer in _searched:
        return
    _searched.add(optimizer)
    known = {reference(): None for reference in _known.keyrefs()}
    wrong = misplaced(
        optimizer, {id(p) for connection in known if connection is not None for p in connection.parameters()}
    )
    if wrong:
        move_out(wrong, optimizer)
        moved = {id(parameter) for parameter in wrong}
        for connection in known:
            if connection is not None and any(id(parameter) in moved for parameter in connection.parameters()):
                _waiting[connection] = _known[connection]


def _before_loading(optimizer: Optimizer) -> None:
    """Give the optimizer the groups that it had when its state was saved."""
    _before_step(optimizer, (), {})


def _living(optimizer: Optimizer) -> list[Optimizer]:
    living = _torch.living_optimizers()
    if all(known is not optimizer for known in living):  # gc.freeze() hides what exists
        living.append(optimizer)
    return living


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001 - the signature of a step hook
    """Join or report parameters that got gradients and are in no optimizer after a step."""
    if torch.compiler.is_compiling() or not _waiting:
        return
    count = _steps[optimizer] = _steps.get(optimizer, 0) + 1
    if count & (count - 1) or not _lacking({}):  # at step 1, 2, 4, 8, ...
        return
    living = _living(optimizer)
    lacking = _lacking(places_of(living))
    if any(_waiting[connection].policy == "extend" for connection in lacking):
        _settle(living, stepping=optimizer, last_resort=True)
        lacking = _lacking(places_of(living))
    mine = places_of([optimizer])
    roots = {connection: _waiting[connection].root() for connection in lacking}
    trained = {root for root in roots.values() if root is not None and any(id(p) in mine for p in root.parameters())}
    lacking = {connection: missing for connection, missing in lacking.items() if roots[connection] in trained}
    _report(lacking, "{count} parameters of hyper-connections got gradients and are in no optimizer")


def _lacking(places: Collection[int]) -> dict[HyperConnection, list[nn.Parameter]]:
    """Return the waiting parameters that got a gradient and are not in `places`."""
    found = {}
    for reference in _waiting.keyrefs():
        connection = reference()
        if connection is not None and connection in _waiting:
            lacking = [p for p in connection.parameters() if _is_trained(p) and id(p) not in places]
            if lacking:
                found[connection] = lacking
    return found


def _is_trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.grad is not None


def _report(lacking: dict[HyperConnection, list[nn.Parameter]], found: str) -> None:
    """Warn of parameters that are not trained, once; if `strict`, raise AttachError.

    `found` says what was found, of {count} parameters of {sites} hyper-connections.
    """
    strict = any(_waiting[connection].strict for connection in lacking)
    names: dict[int, str] = {}
    for root in {_waiting[connection].root() for connection in lacking}:
        names.update({id(p): path for path, p in root.named_parameters()} if root is not None else {})
    parameters = (p for c, missing in lacking.items() if strict or c not in _warned for p in missing)
    shown = [names[id(p)] for p in parameters if id(p) in names]  # others were detached
    _warned.update(lacking)
    if shown:
        more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
        said = found.format(count=len(shown), sites=len(lacking))
        message = f"{said}: {', '.join(shown[:6])}{more}. {WAYS_OUT}"
        if strict:
            raise AttachError(message)
        warn(message)


def _settle(optimizers: list[Optimizer], *, stepping: Optimizer | None, last_resort: bool = False) -> None:
    """Apply the policy of every waiting hyper-connection. `stepping` is about to step."""
    for optimizer in optimizers:
        _take_out(optimizer)
    places = places_of(optimizers)
    arrivals: dict[int, Arrivals] = {}
    left_out: dict[HyperConnection, list[nn.Parameter]] = {}
    in_backward: dict[HyperConnection, list[nn.Parameter]] = {}
    for reference in _waiting.keyrefs():
        connection = reference()
        entry = _waiting.get(connection) if connection is not None else None
        owner, root = (entry.owner(), entry.root()) if entry is not None else (None, None)
        if connection is None or entry is None or owner is None or root is None:
            continue
        absent = [parameter for parameter in connection.parameters() if id(parameter) not in places]
        missing = [parameter for parameter in absent if parameter.requires_grad]
        if not absent:
            _waiting.pop(connection, None)
        if not missing:
            continue
        scopes = list(scopes_of(owner, root, entry.path))
        like_matrix = {parameter for parameter in missing if parameter.dim() >= 2}
        if decayed_by_name(owner):
            # A gated connection has no `scale`.
            like_matrix.update(p for name, p in connection.named_parameters() if name == "scale")
        targets = {
            p: find_places(p, scopes, places, stepping, matrix=p in like_matrix, last_resort=last_resort)
            for p in missing
        }
        if entry.policy == "warn":
            if any(place.optimizer is stepping for found in targets.values() for place in found):
                left_out[connection] = missing
            continue
        for parameter, found in targets.items():
            for place in found:
                arrivals.setdefault(id(root), Arrivals(root)).add(parameter, place)
        known = (place.optimizer for guide in plain_parameters(owner) for place in places.get(id(guide), ()))
        if not all(targets.values()):
            if any(map(_torch.steps_in_backward, known)):
                in_backward[connection] = missing
        elif len(missing) == len(absent):
            _waiting.pop(connection, None)
    for arrival in arrivals.values():
        arrival.insert()
    _report(
        in_backward,
        "{count} parameters of hyper-connections are in no optimizer, because those of their modules step within the"
        " backward (in hooks of Tensor.register_post_accumulate_grad_hook)",
    )
    _report(
        left_out,
        f"{type(stepping).__name__} was built before hyper-connections were attached, or without them, and does not"
        " train {sites} of them (option existing_optimizers='warn')",
    )
    for connection in left_out:
        _waiting.pop(connection, None)
