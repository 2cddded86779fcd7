"""Calls: what a call of a module runs, whether Dynamo traces it, and who compiles its graphs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_eval_frame
from torch._dynamo import eval_frame
from torch._dynamo.eval_frame import OptimizedModule, _debug_get_cache_entry_list, skip_code
from torch._dynamo.output_graph import OutputGraph
from torch.fx import _symbolic_trace as symbolic_tracing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import FrameType

_lock = threading.Lock()
#: The modules, by `id`, whose dispatched calls run as they are in this context; see `uncompiled`.
_as_they_are: ContextVar[frozenset[int]] = ContextVar("mhc_as_they_are", default=frozenset())
#: Whether `torch.export.export` runs, whose program is rewritten at its end.
inside_export: ContextVar[bool] = ContextVar("mhc_inside_export", default=False)


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
    if (type(module).forward.__module__ or "").startswith("torch.nn."):  # code that `exec` ran may have none
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
    dispatch.asks_for = choose  # type: ignore[attr-defined]
    set_compiled_call(module, dispatch)
    return dispatch


def calling_module() -> nn.Module | None:
    """Return the module whose code calls the innermost running module, itself called or not.

    This reads the locals of a user's frame, which keeps them alive until the frame is left.
    """
    calls = nn.Module.__call__.__code__.co_filename
    frame: FrameType | None = sys._getframe(1)
    inside = False
    while frame is not None and not (inside and frame.f_code.co_filename != calls):
        inside = inside or frame.f_code.co_filename == calls
        frame = frame.f_back
    owner = frame.f_locals.get("self") if frame is not None else None
    return owner if isinstance(owner, nn.Module) else None


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
        if hasattr(call, "asks_for"):
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
