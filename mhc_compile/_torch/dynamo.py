"""Dynamo: the frame that is being traced, and what was compiled of it."""

from __future__ import annotations

import re
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import reset_code
from torch._dynamo import graph_break as graph_break
from torch._dynamo.eval_frame import _debug_get_cache_entry_list, innermost_backend
from torch._dynamo.exc import BackendCompilerFailed as BackendCompilerFailed
from torch._dynamo.exc import RestartAnalysis, ShortenTraceback, SkipFrame, TensorifyScalarRestartAnalysis
from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.source import SyntheticLocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx.experimental import symbolic_shapes

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from types import CodeType, FrameType

    from mhc_compile.errors import MhcError


#: Exceptions by which Dynamo changes what it traces.
CONTROL_FLOW = (RestartAnalysis, SkipFrame)
#: An object that is in no frame.
_NOBODY: weakref.ref[object] = weakref.ref(torch.nn.Module)


def _tracer() -> Any:
    return InstructionTranslator.current_tx()


def in_trace() -> bool:
    """Return whether Dynamo is tracing a frame at this moment."""
    try:
        return _tracer() is not None
    # torch stores the tracer in a thread-local that first exists when something was traced
    except AttributeError:
        return False


def restart_trace() -> None:
    """Raise the exception by which Dynamo traces the current frame again from its beginning."""
    # with its speculations logged, the second trace would repeat the graph breaks of the first
    _tracer().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason="mhc_compile attached hyper-connections")


def frame_code() -> CodeType:
    """Return the code object of the frame that is being traced."""
    return _tracer().output.root_tx.f_code  # type: ignore[no-any-return]


def same_function(one: CodeType, other: CodeType) -> bool:
    """Return whether two frames run one function, from its beginning or after a graph break."""
    return (one.co_filename, _written_name(one)) == (other.co_filename, _written_name(other))


def _written_name(code: CodeType) -> str:
    name = code.co_name
    return re.sub(r"_at_\d+(_\d+)?$", "", name[len(TORCH_DYNAMO_RESUME_IN_PREFIX) + 1 :]) if _is_rest(code) else name


def _is_rest(code: CodeType) -> bool:
    return code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)


def ends_at_break() -> bool:
    """Return whether a graph break follows the graph that is being compiled."""
    reason = _tracer().output.compile_subgraph_reason
    return bool(reason is not None and reason.graph_break)


def graph_is_part() -> bool:
    """Return whether the graph that is being compiled ends at a graph break, or follows one."""
    return ends_at_break() or _is_rest(frame_code())


def name_input(node: torch.fx.Node) -> None:
    """Give a new graph input the source that AOTAutograd asks every input of a Dynamo graph for."""
    node._dynamo_source = SyntheticLocalSource(str(node.target))


def numpy_draws_as_in_eager() -> AbstractContextManager[None]:
    """Return a context in which compiled code draws `numpy.random` from NumPy's stream."""
    return torch._dynamo.config.patch(use_numpy_random_stream=True)  # type: ignore[no-any-return]


def has_compiled(code: CodeType) -> bool:
    """Return whether Dynamo keeps a compiled version of this code."""
    return bool(_debug_get_cache_entry_list(code))


def forget_compiled(code: CodeType, *, all_entries: bool) -> None:
    """Make Dynamo trace `code` again at its next call.

    `all_entries` drops all compiled versions, which must not happen while `code` is traced.
    Otherwise they stay with guards that always fail, as after the death of a guarded object.
    """
    if all_entries:
        reset_code(code)
        return
    for entry in _debug_get_cache_entry_list(code):
        if not isinstance(entry.guard_manager, DeletedGuardManagerWrapper):
            _invalidate(entry, "mhc_compile attached hyper-connections")


def make_room() -> None:
    """Make room for one more compiled version of the frame that is being traced.

    Versions of the same backend whose guards hold now would be its duplicates, and are dropped. The
    others stay valid and no longer count towards the recompile limit: Dynamo does not count
    versions of other objects, and a name that no frame has makes them such.
    """
    output = _tracer().output
    backend, scope = innermost_backend(output.compiler_fn), output.local_scope
    for entry in _debug_get_cache_entry_list(frame_code()):
        manager = entry.guard_manager
        if not isinstance(manager, DeletedGuardManagerWrapper) and entry.backend == backend and manager.check(scope):
            _invalidate(entry, "mhc_compile attached hyper-connections to another model like it")
        entry.guard_manager.id_matched_objs = {"": _NOBODY}


def _invalidate(entry: Any, reason: str) -> None:
    state = entry.guard_manager.extra_state
    assert state is not None
    state.invalidate(entry, DeletedGuardManagerWrapper(reason))


def root_module() -> nn.Module | None:
    """Return the traced module: `self` of the outermost frame, else its first module argument."""
    scope: dict[str, Any] = _tracer().output.local_scope
    me = scope.get("self")
    if isinstance(me, nn.Module):
        return me
    for name, value in scope.items():
        if name.startswith("___stack"):  # a module that a graph break left half called
            continue
        for candidate in value if isinstance(value, tuple) else (value,):
            if isinstance(candidate, nn.Module):
                return candidate
    return None


def example_size(size: int | torch.SymInt) -> int:
    """Return a size in the example inputs as a number, without pinning a dynamic size to it."""
    if isinstance(size, int):
        return size
    # Older versions of torch call it `hint_int`.
    name = "optimization_hint" if hasattr(symbolic_shapes, "optimization_hint") else "hint_int"
    return int(getattr(symbolic_shapes, name)(size, fallback=0))


def frame_self() -> Any:
    """Return `self` of the frame that is being traced; None where it has none."""
    return _tracer().output.local_scope.get("self")


def running_objects() -> list[tuple[Any, bool]]:
    """Return the objects whose methods run, innermost first, and whether inside `torch.compile`.

    Only frames of torch's own files are read, those that call modules, DDP and pipeline stages:
    reading the locals of a user's frame would keep them alive until that frame is left.
    """
    stage = sys.modules.get("torch.distributed.pipelining.stage")
    # The frames of DDP are those of its own file; `nn.Module` calls it as it calls any module.
    files = {nn.Module.__call__.__code__.co_filename, getattr(stage, "__file__", None)}
    found: list[tuple[Any, bool]] = []
    frame: FrameType | None = sys._getframe(1)
    inside = True
    while frame is not None:
        code = frame.f_code
        inside = inside and code.co_name != "compile_wrapper"
        if code.co_filename in files:
            owner = frame.f_locals.get("self")
            if owner is not None:
                found.append((owner, inside))
        frame = frame.f_back
    return found


def module_by_id(identity: int) -> nn.Module | None:
    """Return the module with this `id`, among those that the current trace has called, or None."""
    variable = _tracer().output.side_effects.id_to_variable.get(identity)
    value = getattr(variable, "value", None)
    return value if isinstance(value, nn.Module) and id(value) == identity else None


def modules_around(node: torch.fx.Node) -> list[nn.Module | None]:
    """Return the modules whose calls surround a node of the current trace, outermost first."""
    return [module_by_id(int(str(key).split("@")[0])) for key in node.meta.get("nn_module_stack", {})]


def raise_through_dynamo(error: MhcError) -> None:
    """Raise `error` so that it leaves `torch.compile` as itself, without Dynamo's frames."""
    kind = type(error)
    through = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__, "__init__": _init_through})
    raise through(error) from error.__cause__


def _init_through(self: Any, error: MhcError) -> None:
    Exception.__init__(self, *error.args)
    self.first_useful_frame = None
    self.frame_summary_stack = []
