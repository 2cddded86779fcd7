"""Show the parameters of hyper-connections to a tracer.

A backend cannot add inputs to a graph. Therefore the module at the end of a branch (`h.0.attn`, the
declaring module) gets a forward pre-hook that calls the no-op `mhc::declare` on the parameters, and
a tracer lifts them as graph inputs. The hook is not on the block: where the block is the compiled
function, its own hooks run outside the graph.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import _torch
from mhc_compile.attachment.ledger import ran_plain
from mhc_compile.attachment.model_tree import IN_PLACE, connections, unwrap
from mhc_compile.errors import StreamsLostError, warn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType

    from torch import nn

    from mhc_compile.modules.hyper_connection import HyperConnection

#: A declaring module's tuple of hyper-connections. They are submodules of the owner, not of it.
DECLARED = "_mhc_declared"
#: A module's tuple of (site name, hyper-connection) of split branches that it starts.
BEGUN = "_mhc_begun"
#: The handle of the hook.
HOOK = "_mhc_hook"

#: Functions whose traces give models other parameters (`functional_call`).
_swapping: weakref.WeakSet[CodeType] = weakref.WeakSet()
#: The causes of plain runs that were reported, by model.
_reported: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def declare_on(declaring_module: nn.Module, connection: HyperConnection) -> bool:
    """Make calls of `declaring_module` declare `connection`. Return True if they did not before."""
    declared: tuple[HyperConnection, ...] = declaring_module.__dict__.get(DECLARED, ())
    if any(known is connection for known in declared):
        return False
    declaring_module.__dict__[DECLARED] = (*declared, connection)
    if HOOK not in declaring_module.__dict__:
        declaring_module.__dict__[HOOK] = declaring_module.register_forward_pre_hook(_declare)
    return True


def begin_branch(modules: Sequence[nn.Module], connection: HyperConnection, name: str) -> bool:
    """Record that `modules` start the branch of site `name` elsewhere. Return True if new."""
    changed = False
    for module in modules:
        begun: tuple[tuple[str, HyperConnection], ...] = module.__dict__.get(BEGUN, ())
        if not any(known is connection for _, known in begun):
            module.__dict__[BEGUN] = (*begun, (name, connection))
            changed = True
    return (bool(modules) and declare_on(modules[0], connection)) or changed


def start_branch(module: nn.Module, connection: HyperConnection, name: str) -> None:
    """Record that `module` starts the branch of site `name` elsewhere, as `begin_branch` does."""
    module.__dict__[BEGUN] = (*module.__dict__.get(BEGUN, ()), (name, connection))


def declaring_paths(model: nn.Module) -> dict[HyperConnection, list[str]]:
    """Return, by hyper-connection, the paths of the modules that declare it."""
    found: dict[HyperConnection, list[str]] = {}
    for path, module in model.named_modules():
        for connection in module.__dict__.get(DECLARED, ()):
            found.setdefault(connection, []).append(path)
    return found


def starting_paths(model: nn.Module) -> dict[HyperConnection, list[str]]:
    """Return, by hyper-connection, the paths of the modules that start its split branch."""
    found: dict[HyperConnection, list[str]] = {}
    for path, module in model.named_modules():
        for _, connection in module.__dict__.get(BEGUN, ()):
            found.setdefault(connection, []).append(path)
    return found


def begun_by(modules: Sequence[nn.Module | None]) -> tuple[str, HyperConnection] | None:
    """Return name and hyper-connection of the one site whose branch all `modules` start."""
    sites = [module.__dict__.get(BEGUN, ()) if module is not None else () for module in modules]
    common = [site for site in sites[0] if all(any(site[1] is other for _, other in more) for more in sites[1:])]
    return common[0] if len(common) == 1 else None


def remove_declarations(module: nn.Module) -> None:
    """Remove all declarations and the hook from one module."""
    module.__dict__.pop(DECLARED, None)
    module.__dict__.pop(BEGUN, None)
    hook = module.__dict__.pop(HOOK, None)
    if hook is not None:
        hook.remove()


def _declare(declaring_module: nn.Module, args: Any) -> None:  # noqa: ARG001 - the signature of a forward pre-hook
    if torch.compiler.is_dynamo_compiling():
        if _leaves_trace():
            _torch.graph_break(
                msg="hyper-connections under torch.func run outside the trace of the function that uses it"
            )
        _show_tracer(declaring_module)
    elif torch.compiler.is_exporting():
        _show_tracer(declaring_module)
    else:
        _run_outside(declaring_module, split=_torch.traces_calls())


# Called outside of a graph, it would be one of its own.
_torch.begin_no_trace(_declare)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run_outside(declaring_module: nn.Module, *, split: bool) -> None:
    """Count a call outside of a graph. `split`: Dynamo traces what surrounds it."""
    plain = [ran_plain(connection) for connection in declaring_module.__dict__[DECLARED]]
    if any(plain):
        _report_plain_run(declaring_module, split=split)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _leaves_trace() -> bool:
    """Return whether the model must be called without the trace, to see what is done with it."""
    return _torch.under_functorch() or _torch.frame_code() in _swapping


def call_outside_trace(code: CodeType) -> None:
    """Let traces of `code` leave out the models that it calls: it gives them other parameters."""
    _swapping.add(code)


def _show_tracer(declaring_module: nn.Module) -> None:
    for connection in declaring_module._mhc_declared:  # type: ignore[union-attr]
        # The graph will compute this function alone: what a tracer branches on, it guards.
        if not connection.function:
            continue
        for module in (connection, connection.read_out):
            if module is not None:
                torch.ops.mhc.declare(*(getattr(module, name) for name in module.names))


def _report_plain_run(declaring_module: nn.Module, *, split: bool) -> None:
    """Warn, once for each model and cause, that residual adds of the running model are plain.

    Raises:
        StreamsLostError: the model is compiled with `strict`.
    """
    declared = set(declaring_module.__dict__.get(DECLARED, ()))
    running = [owner for owner, _ in _torch.running_objects() if isinstance(owner, torch.nn.Module)]  # innermost first
    owner = next((module for module in running if declared.intersection(connections(module).values())), None)
    if owner is not None:
        model = unwrap(next(module for module in reversed(running) if owner in module.modules()))
        cause = _torch.why_not_traced(type(owner).forward)
    elif not split and (caller := _torch.calling_module()) is not None:
        owner = model = caller
        running = [owner]
        cause = f"its code was called directly, as {type(owner).__name__}.forward(...). Call the module: module(...)"
    if owner is None or declared.isdisjoint(connections(owner).values()) or (split and _torch.runs_in_pieces(owner)):
        return  # called without the add, or a graph follows that has it
    message = (
        f"residual adds of {type(model).__name__} ran as plain adds, without their hyper-connections, in"
        f" {type(owner).__name__}: {cause}"
    )
    in_place = next((module.__dict__[IN_PLACE] for module in running if IN_PLACE in module.__dict__), None)
    if in_place is not None and in_place.options.strict:
        raise StreamsLostError(message)
    causes = _reported.setdefault(model, set())
    if cause not in causes:
        causes.add(cause)
        warn(message, repeat=True)
