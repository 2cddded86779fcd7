"""Every private name of torch that this package uses, in one place, each with what it is for.

Checked on torch 2.13.0 (CPU). A name that a version of torch lacks fails here, with the version in the message, and nowhere else.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
import weakref
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.fx.experimental import symbolic_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import CodeType, FrameType

    from torch.nn.parallel import DistributedDataParallel

    from mhc_compile.errors import MhcError

try:
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._dynamo.backends.registry import lookup_backend
    from torch._dynamo.eval_frame import OptimizedModule, _debug_get_cache_entry_list, innermost_backend
    from torch._dynamo.exc import (
        BackendCompilerFailed,
        ShortenTraceback,
        TensorifyScalarRestartAnalysis,
        TorchDynamoException,
    )
    from torch._dynamo.guards import DeletedGuardManagerWrapper
    from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
    from torch._dynamo.source import SyntheticLocalSource
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import decompositions as inductor_decompositions
    from torch._inductor.decomposition import fast_random_decomps
    from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
except ImportError as error:  # pragma: no cover - depends on the torch that is installed
    raise ImportError(
        f"mhc_compile works with torch 2.11 to 2.13; torch {torch.__version__} lacks what it needs: {error}"
    ) from error

__all__ = [
    "BackendCompilerFailed",
    "OptimizedModule",
    "TensorWeakRef",
    "TorchDynamoException",
    "WeakTensorKeyDictionary",
    "caller",
    "compile_with_inductor",
    "ddp_parameters",
    "ends_at_break",
    "example_size",
    "forget_compiled",
    "frame_code",
    "frame_location",
    "fsdp_hooks",
    "graph_is_part",
    "has_compiled",
    "in_trace",
    "inductor_settings",
    "inner_backend",
    "is_sharded",
    "isolated_compile",
    "lbfgs_has_memory",
    "load_cpp",
    "make_room",
    "module_by_id",
    "modules_in_use",
    "name_input",
    "numpy_draws_as_in_eager",
    "pipeline_stage",
    "placements",
    "raise_through_dynamo",
    "restart_lbfgs",
    "restart_trace",
    "rewrite_before_ddp_splits",
    "root_module",
    "runs_inside_another",
    "same_function",
    "split_as_ddp_would",
    "whole_graphs",
]


T = TypeVar("T")
#: Stands for an object that is in no frame.
_NOBODY: weakref.ref[object] = weakref.ref(torch.nn.Module)


def _tracer() -> Any:
    return InstructionTranslator.current_tx()


def in_trace() -> bool:
    """Whether Dynamo is tracing a frame at this moment, so that there is something to restart."""
    try:
        return _tracer() is not None
    except AttributeError:  # torch stores the tracer in a thread-local that first exists when something was traced
        return False


def restart_trace() -> None:
    """Asks Dynamo to trace the current frame again from its beginning. Raises; never returns.

    The log of speculations must be empty, or the second trace would be held to the graph breaks of the first.
    """
    _tracer().speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason="mhc_compile attached hyper-connections")


def frame_code() -> CodeType:
    """The code object of the frame that is being traced."""
    return _tracer().output.root_tx.f_code  # type: ignore[no-any-return]


def frame_location() -> str:
    """File and line of the frame that is being traced."""
    code = frame_code()
    return f"{code.co_filename}:{code.co_firstlineno}"


def same_function(one: CodeType, other: CodeType) -> bool:
    """Whether two frames run the same function of the user, one perhaps from its beginning and the other from behind a graph break."""
    return (one.co_filename, _written_name(one)) == (other.co_filename, _written_name(other))


def _written_name(code: CodeType) -> str:
    name = code.co_name
    return re.sub(r"_at_\d+(_\d+)?$", "", name[len(TORCH_DYNAMO_RESUME_IN_PREFIX) + 1 :]) if _is_rest(code) else name


def _is_rest(code: CodeType) -> bool:
    return code.co_name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)


def ends_at_break() -> bool:
    """Whether a graph break follows the graph that is being compiled."""
    reason = _tracer().output.compile_subgraph_reason
    return bool(reason is not None and reason.graph_break)


def graph_is_part() -> bool:
    """Whether the graph that is being compiled ends at a graph break, or begins behind one."""
    return ends_at_break() or _is_rest(frame_code())


def name_input(node: torch.fx.Node) -> None:
    """Gives a graph input that Dynamo does not know a source: AOTAutograd asks every input of a Dynamo graph for one."""
    node._dynamo_source = SyntheticLocalSource(str(node.target))


def numpy_draws_as_in_eager() -> AbstractContextManager[None]:
    """A context in which compiled code draws `numpy.random` from NumPy's stream, as eager code does; Dynamo's default is torch's."""
    return torch._dynamo.config.patch(use_numpy_random_stream=True)  # type: ignore[no-any-return]


def has_compiled(code: CodeType) -> bool:
    """Whether Dynamo keeps a compiled version of this code."""
    return bool(_debug_get_cache_entry_list(code))


def forget_compiled(code: CodeType, *, all_entries: bool) -> None:
    """Makes Dynamo trace `code` again at its next call.

    `all_entries` drops everything that is known of the code, which must not happen while it is being traced. Otherwise the compiled versions
    stay in their list with guards that always fail, as Dynamo itself does when a guarded object dies.
    """
    if all_entries:
        reset_code(code)
        return
    for entry in _debug_get_cache_entry_list(code):
        if not isinstance(entry.guard_manager, DeletedGuardManagerWrapper):
            _invalidate(entry, "mhc_compile attached hyper-connections")


def make_room() -> None:
    """Makes room for one more compiled version of the frame that is being traced, whose guards will hold for what they did not hold for before.

    Versions of the same backend whose guards hold now would be its duplicates: they are dropped, and whoever used them will use the new one. The
    others stay valid and no longer count towards the recompile limit: Dynamo counts those of which it cannot tell that they are another object's,
    and a name that no frame has makes them such.
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


def isolated_compile(function: Callable[..., Any], backend: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`torch.compile` whose graphs do not count towards the recompile limit of the model's code, where torch can do that (2.13).

    `settings` that this torch does not know are left out.
    """
    # Lightning replaces `torch.compile` by one that writes its arguments, our backend among them, on the model, which then cannot be pickled.
    plain: Any = inspect.unwrap(torch.compile)
    known = inspect.signature(plain).parameters
    wanted: dict[str, Any] = {"isolate_recompiles": True, **settings}
    return plain(function, backend=backend, **{name: value for name, value in wanted.items() if name in known})  # type: ignore[no-any-return]


def root_module() -> nn.Module | None:
    """The module whose method Dynamo traces: `self` of the outermost frame, or else the first module among its arguments."""
    scope: dict[str, Any] = _tracer().output.local_scope
    me = scope.get("self")
    if isinstance(me, nn.Module):
        return me
    for name, value in scope.items():
        if name.startswith(
            "___stack"
        ):  # what a graph break left half evaluated: some module that is about to be called
            continue
        candidates = value if isinstance(value, tuple) else (value,)
        for candidate in candidates:
            if isinstance(candidate, nn.Module):
                return candidate
    return None


def modules_in_use() -> list[nn.Module]:
    """The modules whose calls surround this one in Python, the innermost first."""
    return [module for _, module in _calls()]


def example_size(size: int | torch.SymInt) -> int:
    """The number that a size is in the example inputs. Unlike `int(size)` this does not pin a dynamic size to it."""
    if isinstance(size, int):
        return size
    # Older versions of torch call it `hint_int`.
    name = "optimization_hint" if hasattr(symbolic_shapes, "optimization_hint") else "hint_int"
    return int(getattr(symbolic_shapes, name)(size, fallback=0))


def runs_inside_another(module: nn.Module) -> bool:
    """Whether the method of a module that holds `module` runs round the current frame, in Python, since `torch.compile` was entered."""
    return any(
        within and owner is not module and any(one is module for one in owner.modules()) for within, owner in _calls()
    )


def _calls() -> Iterator[tuple[bool, nn.Module]]:
    """Calls of modules round this frame, the innermost first, each with whether it came after `torch.compile` was entered.

    Only local variables of torch's own frames are read: those of a user's frame would be kept alive by that until the frame is left.
    """
    frame: FrameType | None = sys._getframe(1)
    within = True
    while frame is not None:
        code = frame.f_code
        within = within and code.co_name != "compile_wrapper"
        if code.co_filename == nn.Module.__call__.__code__.co_filename:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                yield within, owner
        frame = frame.f_back


def module_by_id(identity: int) -> nn.Module | None:
    """The module with this `id`, among those that the current trace has called."""
    variable = _tracer().output.side_effects.id_to_variable.get(identity)
    value = getattr(variable, "value", None)
    return value if isinstance(value, nn.Module) and id(value) == identity else None


def inner_backend(name: str) -> Callable[..., Any]:
    """A `torch.compile` backend by name."""
    return lookup_backend(name)


def inductor_settings() -> list[str]:
    """The names of Inductor's settings: what `torch.compile(options=...)` takes with that backend."""
    from torch._inductor import list_options

    return list_options()


def cpp_compiler() -> str:
    """The C++ compiler that Inductor calls.

    Raises:
        Exception: there is none, in Inductor's words.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return str(get_cpp_compiler())


def cache_folder() -> str:
    """Where Inductor keeps what it compiled; made if it is not there.

    Raises:
        OSError: it cannot be made.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


@contextmanager
def inductor_code() -> Iterator[list[str]]:
    """Collects the modules of Python that Inductor writes, in order. Its caches are passed by, so that it writes what it would otherwise find."""
    import torch._inductor.config as config
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []
    saved = vars(GraphLowering)["save_output_code"]
    GraphLowering.save_output_code = staticmethod(codes.append)
    try:
        with config.patch(force_disable_caches=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*force disabled.*")
            yield codes
    finally:
        GraphLowering.save_output_code = saved


def compile_with_inductor(
    module: torch.fx.GraphModule,
    inputs: list[Any],
    decompositions: dict[Any, Callable[..., Any]],
    mode: str | None,
    settings: dict[str, Any],
    tag: str,
) -> Callable[..., Any]:
    """Inductor with decompositions of ours beside its own. `mode` and `settings` are those of `torch.compile`.

    `tag` goes into the key of the caches: they know our operators by name only, and must not serve what another version of them compiled.

    The decompositions are of our operators alone and go into Inductor's own table: a table handed over with the call cannot be hashed, and
    Inductor would then bypass its caches of compiled graphs.
    """
    from torch._inductor import list_mode_options

    if not decompositions.keys() <= inductor_decompositions.keys():
        from torch._inductor.lowering import make_fallback

        inductor_decompositions.update(decompositions)
        fast_random_decomps.cache_clear()
        for (
            op
        ) in decompositions:  # what its decomposition leaves alone is called as it is; its kernel takes any strides
            make_fallback(op, warn=False, override_decomp=True)
    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **settings}
    config: Any = torch.compiler.config  # mypy does not see that it has the methods of a configuration
    with config.patch(cache_key_tag=f"{config.cache_key_tag}{tag}"):
        compiled: Any = compile_fx(module, inputs, config_patches=patches or None)
    return compiled  # type: ignore[no-any-return]


#: The optimizer of DDP's graphs that waits for the rewritten graph, while a backend of ours works on the whole one.
_ddp_optimizer: ContextVar[DDPOptimizer | None] = ContextVar("mhc_ddp_optimizer", default=None)
_split: Callable[..., Any] = DDPOptimizer.compile_fn


def rewrite_before_ddp_splits(backend: Callable[..., Any]) -> None:
    """Makes Dynamo hand `backend` the whole graph of a model in DDP; every other backend gets its pieces as ever.

    Under `DistributedDataParallel` Dynamo cuts a graph into a piece for each bucket of gradients and calls the backend for each piece, so that
    buckets are reduced while the backward is still running. `backend` is called once instead, with the inputs that Dynamo traced, and cuts its own
    result by `split_as_ddp_would`.
    """

    @functools.wraps(_split)
    def compile_fn(self: DDPOptimizer, graph_module: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Any:
        if _innermost(self.backend_compile_fn) is not backend:
            return _split(self, graph_module, inputs, **settings)
        token = _ddp_optimizer.set(self)
        try:
            return self.backend_compile_fn(graph_module, inputs, **settings)
        finally:
            _ddp_optimizer.reset(token)

    DDPOptimizer.compile_fn = compile_fn  # type: ignore[assignment, method-assign]


def _innermost(backend: Any) -> Any:
    """The function behind the objects that `torch.compile` and its users wrap around a backend."""
    while True:
        if isinstance(backend, functools.partial):
            backend = backend.func
        elif "_torchdynamo_orig_backend" in getattr(backend, "__dict__", {}):
            backend = backend._torchdynamo_orig_backend
        elif isinstance(backend, torch._TorchCompileWrapper):
            backend = backend.compiler_fn
        else:
            return backend


def split_as_ddp_would(
    graph_module: torch.fx.GraphModule, inputs: list[Any], compiler: Callable[..., Any]
) -> Callable[..., Any]:
    """Compiles a graph: in pieces where the model is in DDP and Dynamo is told to overlap its reductions, else as one."""
    optimizer = _ddp_optimizer.get()
    if optimizer is None:
        return compiler(graph_module, inputs)  # type: ignore[no-any-return]
    pieces = DDPOptimizer(optimizer.bucket_bytes_cap, compiler, optimizer.first_bucket_cap)
    return _split(pieces, graph_module, inputs)  # type: ignore[no-any-return]


def whole_graphs() -> AbstractContextManager[None]:
    """In this context Dynamo does not cut the graphs of models in DDP."""
    return torch._dynamo.config.patch(optimize_ddp=False)  # type: ignore[no-any-return]


def caller(kind: type[T]) -> T | None:
    """The nearest object of class `kind` whose method is running, Python's stack and the frame that Dynamo traces taken together."""
    me = _tracer().output.local_scope.get("self") if in_trace() else None
    source = sys.modules[kind.__module__].__file__
    frame: FrameType | None = sys._getframe(1)
    while not isinstance(me, kind) and frame is not None:
        if frame.f_code.co_filename == source:  # looking at the locals of any other frame would keep them alive
            me = frame.f_locals.get("self")
        frame = frame.f_back
    return me if isinstance(me, kind) else None


def ddp_parameters(ddp: DistributedDataParallel) -> set[int]:
    """`id` of every parameter that `ddp` found in its module when it was built."""
    return {id(parameter) for parameter in ddp._module_parameters} | {
        id(parameter) for parameter in ddp.parameters() if getattr(parameter, "_ddp_ignored", False)
    }


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP manages the parameters of this module, in whichever group."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def placements(value: Any) -> tuple[Any, ...] | None:
    """How a DTensor is laid out over ranks; None for any other value."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has DTensors has loaded it
    return value.placements if module is not None and isinstance(value, module.DTensor) else None


def fsdp_hooks(module: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What FSDP does before and after the forward of `module`, one to which `fully_shard` was applied."""
    state = module._get_fsdp_state()
    return state._pre_forward, state._post_forward


def pipeline_stage() -> tuple[int, int] | None:
    """Number of the pipeline stage whose submodule is being traced, and how many there are; None outside pipelines of several stages."""
    module = sys.modules.get("torch.distributed.pipelining.stage")
    stage = caller(module.PipelineStage) if module is not None else None
    return (stage.stage_index, stage.num_stages) if stage is not None and stage.num_stages > 1 else None


def load_cpp(source: str) -> Any:
    """Compiles C++ with Inductor's compiler and flags, once for all processes, and loads it with ctypes."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)


def lbfgs_has_memory(optimizer: torch.optim.LBFGS) -> bool:
    """Whether it holds flat vectors (directions, gradients) as long as all its parameters together."""
    return any(state.get("n_iter") for state in optimizer.state.values())


def restart_lbfgs(optimizer: torch.optim.LBFGS) -> None:
    """Makes it forget its vectors and their length, because it is about to have other parameters. Not in the middle of a step."""
    if lbfgs_has_memory(optimizer):
        optimizer.state.clear()
    optimizer._numel_cache = None


def raise_through_dynamo(error: MhcError) -> None:
    """Raises `error` so that it leaves `torch.compile` as itself, not wrapped in BackendCompilerFailed, and without Dynamo's frames."""
    kind = type(error)
    through = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__, "__init__": _init_through})
    raise through(error) from error.__cause__


def _init_through(self: Any, error: MhcError) -> None:
    Exception.__init__(self, *error.args)
    self.first_useful_frame = None
    self.frame_summary_stack = []
