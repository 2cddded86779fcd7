"""Inductor: its compiler, its code, its settings and caches."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import ir, list_mode_options, list_options
from torch._inductor.codecache import CppCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.decomposition import decompositions as inductor_decompositions
from torch._inductor.decomposition import fast_random_decomps
from torch._inductor.graph import GraphLowering
from torch._inductor.lowering import fallback_handler, make_fallback, register_lowering, to_dtype
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import convert_shape_to_inductor
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


#: Held while Inductor's global tables or methods are patched: two threads may compile.
_lock = threading.RLock()
#: Held while Inductor finds out what vectors the machine has.
_detecting = threading.Lock()


def inner_backend(name: str) -> Callable[..., Any]:
    """Return the `torch.compile` backend of that name."""
    return lookup_backend(name)


def inductor_settings() -> list[str]:
    """Return the names of Inductor's settings, as in `torch.compile(options=...)`."""
    return list_options()


def is_inductor(compiler: Any) -> bool:
    """Return whether a backend is what `torch.compile` makes of "inductor"."""
    return isinstance(compiler, torch._TorchCompileInductorWrapper)


def settings_of(compiler: Any) -> dict[str, Any]:
    """Return the settings of such a backend: those of `mode=` and `options=`."""
    return dict(compiler.config)


def cpp_compiler() -> str:
    """Return the C++ compiler that Inductor calls, or raise Inductor's exception."""
    return str(get_cpp_compiler())


def cache_folder() -> str:
    """Return the folder of Inductor's caches, or raise OSError where it cannot be created."""
    return str(cache_dir())


@contextmanager
def inductor_code() -> Iterator[list[str]]:
    """Collect the Python modules that Inductor writes in this context, with caches disabled."""
    codes: list[str] = []
    patched = mock.patch.object(GraphLowering, "save_output_code", staticmethod(codes.append))
    with _lock, patched, inductor_config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*force disabled.*")
        yield codes


def register_decompositions(
    decompositions: dict[Any, Callable[..., Any]], externs: Mapping[Any, Callable[..., Extern | None]] | None = None
) -> None:
    """Patch Inductor's table of decompositions. Repeated calls change nothing.

    A table that is passed with the call cannot be hashed, and Inductor would then bypass its caches
    of compiled graphs. An operator that its decomposition does not decompose is called as it is,
    with any strides, or as `register_extern` has it.
    """
    with _lock:
        new = {op: function for op, function in decompositions.items() if op not in inductor_decompositions}
        if not new:
            return
        inductor_decompositions.update(new)
        fast_random_decomps.cache_clear()
        for op in new:
            make_fallback(op, warn=False, override_decomp=True)
        for op, plan in (externs or {}).items():
            register_extern(op, plan)


def compile_with_inductor(
    module: torch.fx.GraphModule,
    inputs: list[Any],
    decompositions: dict[Any, Callable[..., Any]],
    externs: Mapping[Any, Callable[..., Extern | None]],
    mode: str | None,
    settings: dict[str, Any],
    tag: str,
) -> Callable[..., Any]:
    """Compile with Inductor, adding decompositions and calls of `mhc::` operators to its tables.

    `mode` and `settings` are those of `torch.compile`. `tag` becomes part of the key of Inductor's
    caches, which know operators by name only, and not by version.
    """
    if any(isinstance(tensor, torch.Tensor) and tensor.is_cpu for tensor in inputs):
        _detect_vectors()
    register_decompositions(decompositions, externs)
    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **settings}
    # mypy does not see that it has the methods of a configuration
    config: Any = torch.compiler.config
    tags = {"cache_key_tag": f"{config.cache_key_tag}{tag}"}
    with config.patch(tags):
        # A backward is compiled when it is first called, outside of this context.
        inner = config.patch(tags)(compile_fx_inner)
        compiled: Any = compile_fx(module, inputs, inner, config_patches=patches or None)
    return compiled  # type: ignore[no-any-return]


@contextmanager
def rewrite_joint_graphs(rewrite: Callable[[torch.fx.Graph], torch.fx.Graph]) -> Iterator[None]:
    """In this context AOTAutograd rewrites graphs of forward and backward before it splits them."""
    before = functorch_config.joint_custom_pass

    def run(module: torch.fx.GraphModule, inputs: Any) -> torch.fx.GraphModule:
        if callable(before):
            module = before(module, inputs)
        module.graph = rewrite(module.graph)
        return module

    with functorch_config.patch(joint_custom_pass=run):
        yield


@dataclass(frozen=True)
class Extern:
    """A call, in the code that Inductor writes, of a Python function that fills its results.

    Attributes:
        name: of the function in that code.
        imports: lines at its beginning that define the name.
        tensors: what it takes, in order: a tensor in Inductor's form, a list of such, or None; and
            the dtype to which Inductor casts it.
        results: the dtypes that it writes, None if those of the operator's own results.
        numbers: what follows the results: integers, expressions, floats, and `(function, integer)`.
    """

    name: str
    imports: tuple[str, ...]
    tensors: list[tuple[Any, torch.dtype]]
    results: list[torch.dtype] | None
    numbers: tuple[Any, ...]


class _Result(ir.MultiOutput):
    """A contiguous result of an `_ExternCall`, in memory that Inductor allocates."""

    def should_allocate(self) -> bool:
        return True

    def codegen(self, wrapper: Any) -> None:
        """Write nothing: the call has filled it."""


class _ExternCall(ir.ExternKernelAlloc):
    """The call of an `Extern`, as a node of Inductor's graph."""

    def __init__(self, extern: Extern, device: torch.device) -> None:
        def ready(value: Any, dtype: torch.dtype) -> Any:
            if isinstance(value, list):
                return [ready(one, dtype) for one in value]
            if value is None:
                return None
            return self.realize_input(self.require_contiguous(to_dtype(value, dtype)))

        self.extern = extern
        self.arguments = [ready(value, dtype) for value, dtype in extern.tensors]
        lists = [one if isinstance(one, list) else [one] for one in self.arguments]
        super().__init__(
            ir.MultiOutputLayout(device=device), [one for many in lists for one in many if one is not None]
        )

    def codegen(self, wrapper: Any) -> None:
        """Allocate the results, and write the call."""
        self.codegen_comment(wrapper)
        root = wrapper
        while hasattr(root, "parent_wrapper"):
            root = root.parent_wrapper
        for line in self.extern.imports:
            root.add_import_once(line)
        unused = []
        for result in self.outputs:
            if result.get_name() in V.graph.removed_buffers:  # nobody reads it, but it is written
                unused.append(result.get_name())
                wrapper.writeline(wrapper.make_buffer_allocation(result))
            else:
                wrapper.codegen_allocation(result)

        def shown(value: Any) -> str:
            if value is None:
                return "None"
            if isinstance(value, list):
                return f"[{', '.join(map(shown, value))}]"
            if isinstance(value, ir.IRNode):
                return str(value.codegen_reference())
            if isinstance(value, tuple):
                return f"{value[0]}({shown(value[1])})"
            return repr(value) if isinstance(value, float) else str(wrapper.codegen_python_sizevar(value))

        arguments = map(shown, (*self.arguments, *self.outputs, *self.extern.numbers))
        # Inductor deletes the name of every node.
        wrapper.writeline(f"{self.get_name()} = {self.extern.name}({', '.join(arguments)})")
        if unused:
            wrapper.writeline(f"del {', '.join(unused)}")


def register_extern(operator: Any, plan: Callable[..., Extern | None]) -> None:
    """Make Inductor write a call of what `plan` returns for the operator's arguments.

    The operator is called where that is None, in C++ that Inductor writes, and where the number of
    elements depends on data.
    """
    call_operator = fallback_handler(operator)

    def lower(*args: Any, **kwargs: Any) -> Any:
        results = V.graph.current_node.meta["val"]
        several = isinstance(results, tuple | list)
        metas: Sequence[torch.Tensor] = results if several else [results]
        extern = None
        if not V.graph.cpp_wrapper and not any(free_unbacked_symbols(meta.shape) for meta in metas):
            extern = plan(*args, **kwargs)
        if extern is None:
            return call_operator(*args, **kwargs)
        device = metas[0].device
        call = _ExternCall(extern, device)
        boxes = []
        for number, (meta, dtype) in enumerate(
            zip(metas, extern.results or [meta.dtype for meta in metas], strict=True)
        ):
            size = convert_shape_to_inductor(meta.shape)
            layout = ir.FixedLayout(device, dtype, size, ir.FlexibleLayout.contiguous_strides(size))
            call.outputs = [*call.outputs, _Result(layout, call, [(tuple, number)])]
            boxes.append(to_dtype(ir.TensorBox.create(call.outputs[-1]), meta.dtype))
        return tuple(boxes) if several else boxes[0]

    register_lowering(operator, type_promotion_kind=None)(lower)


def tensor_address_function() -> int:
    """Return the address of the C function that gives the address of a tensor's data."""
    return int(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)  # type: ignore[attr-defined]


def _detect_vectors() -> None:
    """Find out, once, with which flags C++ is compiled here.

    Meanwhile Inductor changes flags of an object that all threads share: another thread would
    compile with flags that the next process does not have, which would find nothing in the cache.
    """
    with _detecting:
        pick_vec_isa()


def load_cpp(source: str) -> Any:
    """Compile C++ as Inductor does, once for all processes, and load it with ctypes."""
    _detect_vectors()
    return CppCodeCache.load(source)
