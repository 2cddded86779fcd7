"""Dynamo: the frame that is being traced, and what was compiled of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
import threading
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback, reset_code, set_eval_frame
from torch._dynamo import eval_frame
from torch._dynamo import graph_break as graph_break
from torch._dynamo.eval_frame import OptimizedModule, _debug_get_cache_entry_list, innermost_backend, skip_code
from torch._dynamo.exc import BackendCompilerFailed as BackendCompilerFailed
from torch._dynamo.exc import RestartAnalysis, ShortenTraceback, SkipFrame, TensorifyScalarRestartAnalysis
from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.source import SyntheticLocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import _symbolic_trace as symbolic_tracing
from torch.fx.experimental import symbolic_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import CodeType, FrameType

    from mhc_compile.errors import MhcError


#: Exceptions by which Dynamo changes what it traces.
CONTROL_FLOW = (RestartAnalysis, SkipFrame)
#: An object that is in no frame.
_NOBODY: weakref.ref[object] = weakref.ref(torch.nn.Module)
_lock = threading.Lock()
#: The modules, by `id`, whose dispatched calls run as they are in this context; see `uncompiled`.
_as_they_are: ContextVar[frozenset[int]] = ContextVar("mhc_as_they_are", default=frozenset())
#: Whether `torch.export.export` runs, whose program is rewritten at its end.
inside_export: ContextVar[bool] = ContextVar("mhc_inside_export", default=False)


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


def begin_no_trace(function: Callable[..., Any]) -> None:
    """Let no trace begin at a call of `function`. Traces of its callers still follow it."""
    skip_code(function.__code__)


def traces_calls() -> bool:
    """Return whether Dynamo traces the functions that are called now: inside `torch.compile`."""
    return callable(get_eval_frame_callback())


def runs_in_pieces(owner: nn.Module) -> bool:
    """Return whether the code of `owner` that calls its child now is a piece that Dynamo made.

    Dynamo runs a frame as it was written if it cannot cut it, as at a graph break inside a loop.
    """
    calls = nn.Module.__call__.__code__.co_filename
    frame: FrameType | None = sys._getframe(1)
    caller, inside = None, False
    while frame is not None:
        if frame.f_code.co_filename == calls:
            if caller is not None and frame.f_locals.get("self") is owner:
                break
            inside = True
        elif inside:
            caller, inside = frame.f_code, False
        frame = frame.f_back
    return caller is not None and any(name.startswith(("__compiled_fn", "__resume_at")) for name in caller.co_names)


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


def isolated_compile(
    function: Callable[..., Any], backend: Callable[..., Any], *, fullgraph: bool = False
) -> Callable[..., Any]:
    """Compile any number of versions, which do not count for the limit of others (torch 2.13)."""
    # Lightning replaces `torch.compile` by one that writes its arguments, our backend among them,
    # on the model, which then cannot be pickled.
    plain: Any = inspect.unwrap(torch.compile)
    known = inspect.signature(plain).parameters
    wanted = {"isolate_recompiles": True, "recompile_limit": 1_000_000}  # beyond its usual 8 Dynamo compiles no more
    settings = {name: value for name, value in wanted.items() if name in known}
    return plain(function, backend=backend, fullgraph=fullgraph, **settings)  # type: ignore[no-any-return]


def compile_call(module: nn.Module, backend: Callable[..., Any], *, fullgraph: bool = False) -> Callable[..., Any]:
    """Return a call of `module` that is compiled as `module.compile()` would."""
    call = module._call_impl
    if type(module).forward.__module__.startswith("torch.nn."):
        # Dynamo starts no trace in files of torch.nn, but follows calls into them.
        def call(*args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)

    return isolated_compile(call, backend, fullgraph=fullgraph)


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """Return what `module.compile()` or `dispatch_calls` has set for this module, or None."""
    return module.__dict__.get("_compiled_call_impl")


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Make calls of `module` run `call`, or run uncompiled for None."""
    if call is None:
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module.__dict__["_compiled_call_impl"] = call


def dispatch_calls(module: nn.Module, choose: Callable[[bool], Callable[..., Any] | None]) -> Callable[..., Any]:
    """Let `choose` decide what every call of `module` runs.

    It gets whether the call comes from a frame that `torch.compile` runs, and returns a function,
    or None for the call as it is. A trace of Dynamo sees the call as it is. Return what
    `compiled_call` gives from now on.
    """
    as_it_is = module._call_impl

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if id(module) in _as_they_are.get():
            return as_it_is(*args, **kwargs)
        compiler = set_eval_frame(None)  # it would trace `choose`
        try:
            chosen = choose(callable(compiler))
            if chosen is not None:
                return chosen(*args, **kwargs)
        finally:
            set_eval_frame(compiler)
        return as_it_is(*args, **kwargs)

    skip_code(dispatch.__code__)  # neither compiled itself nor in the way of what it calls
    dispatch._torchdynamo_inline = as_it_is  # type: ignore[attr-defined]
    set_compiled_call(module, dispatch)
    return dispatch


def rewrite_for_other_compilers(rewrite: Callable[[Callable[..., Any], torch.fx.GraphModule, list[Any]], Any]) -> None:
    """Patch Dynamo to call the compiler that `rewrite(compiler, graph, inputs)` returns."""
    with _lock:
        original = OutputGraph.call_user_compiler
        if original.__module__ == __name__:
            return

        @functools.wraps(original)
        def call_user_compiler(self: Any, graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            given = self.compiler_fn
            self.compiler_fn = rewrite(given, graph_module, inputs)
            try:
                return original(self, graph_module, inputs)
            finally:
                self.compiler_fn = given

        call_user_compiler.__module__ = __name__
        OutputGraph.call_user_compiler = call_user_compiler  # type: ignore[method-assign, assignment]


def after_compiling_in_place(then: Callable[[nn.Module], None]) -> None:
    """Patch `nn.Module.compile` to call `then(module)` at its end."""
    with _lock:
        original = nn.Module.compile
        if original.__module__ == __name__:
            return

        @functools.wraps(original)
        def compile_in_place(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            then(self)

        compile_in_place.__module__ = __name__
        nn.Module.compile = compile_in_place  # type: ignore[method-assign]


def why_not_traced(function: Callable[..., Any]) -> str:
    """Return why Dynamo does not trace this function, which runs, and the way out."""
    if torch._dynamo.config.disable:
        return (
            "torch.compile is switched off (TORCHDYNAMO_DISABLE, TORCH_COMPILE_DISABLE or torch._dynamo.config.disable),"
            " and without Dynamo nothing finds the residual adds. Switch it on"
        )
    if is_symbolic_trace():
        return (
            "torch.fx.symbolic_trace runs the model itself. Give its graph the hyper-connections with"
            " mhc_compile.rewrite(symbolic_trace(mhc_compile.plain(model)), inputs), or use torch.export.export(model)"
        )
    code = getattr(inspect.unwrap(function), "__code__", None)
    versions = len(_debug_get_cache_entry_list(code)) if code is not None else 0
    limit = min(torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit)
    if versions >= limit:
        return (
            f"Dynamo has compiled {versions} versions of it, and its limit ends that. TORCH_LOGS=recompiles names what"
            " changes; mark it dynamic, or raise torch._dynamo.config.accumulated_recompile_limit"
        )
    return (
        "Dynamo does not trace this code (torch.compiler.disable, a graph break in a loop or `try`, a hook, code that it"
        " does not support)."
        " TORCH_LOGS=graph_breaks shows the place; mhc_compile.plain(model) is the model without hyper-connections"
    )


def is_symbolic_trace() -> bool:
    """Return whether `torch.fx.symbolic_trace` runs."""
    return symbolic_tracing.is_fx_symbolic_tracing()


def default_stance() -> AbstractContextManager[Any]:
    """Return a context in which `torch.compiler.set_stance` is without effect."""
    return torch.compiler.set_stance("default") if eval_frame._stance.stance != "default" else contextlib.nullcontext()


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let compiled modules inside `model` run eagerly in this context.

    Inside another `torch.compile` they would run as they were compiled, and hide from its capture.
    Other threads still get what `dispatch_calls` has set.
    """
    changed: list[tuple[nn.Module, str, Any]] = []
    dispatched = set(_as_they_are.get())
    for module in model.modules():
        call = module.__dict__.get("_compiled_call_impl")
        if hasattr(call, "_torchdynamo_inline"):
            dispatched.add(id(module))
        elif call is not None:
            changed.append((module, "_compiled_call_impl", None))
        if isinstance(module, OptimizedModule):
            changed.append((module, "forward", module._orig_mod.__call__))
    before = [(module, name, module.__dict__[name]) for module, name, _ in changed]
    token = _as_they_are.set(frozenset(dispatched))
    try:
        for module, name, value in changed:
            module.__dict__[name] = value
        yield
    finally:
        _as_they_are.reset(token)
        for module, name, value in before:
            module.__dict__[name] = value


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
