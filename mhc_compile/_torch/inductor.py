"""Inductor: its compiler, its code, its settings and caches."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.codecache import CppCodeCache
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import decompositions as inductor_decompositions
from torch._inductor.decomposition import fast_random_decomps
from torch._inductor.graph import GraphLowering
from torch._inductor.lowering import make_fallback
from torch._inductor.runtime.cache_dir_utils import cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


#: Held while Inductor's global tables or methods are patched: two threads may compile.
_lock = threading.RLock()


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


def register_decompositions(decompositions: dict[Any, Callable[..., Any]]) -> None:
    """Patch Inductor's table of decompositions. Repeated calls change nothing.

    A table that is passed with the call cannot be hashed, and Inductor would then bypass its caches
    of compiled graphs. An operator that its decomposition does not decompose is called as it is;
    its kernel takes any strides.
    """
    with _lock:
        new = {op: function for op, function in decompositions.items() if op not in inductor_decompositions}
        if not new:
            return
        inductor_decompositions.update(new)
        fast_random_decomps.cache_clear()
        for op in new:
            make_fallback(op, warn=False, override_decomp=True)


def compile_with_inductor(
    module: torch.fx.GraphModule,
    inputs: list[Any],
    decompositions: dict[Any, Callable[..., Any]],
    mode: str | None,
    settings: dict[str, Any],
    tag: str,
) -> Callable[..., Any]:
    """Compile with Inductor, adding decompositions of `mhc::` operators to its table.

    `mode` and `settings` are those of `torch.compile`. `tag` becomes part of the key of Inductor's
    caches, which know operators by name only, and not by version.
    """
    register_decompositions(decompositions)
    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **settings}
    # mypy does not see that it has the methods of a configuration
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag}{tag}"):
        compiled: Any = compile_fx(module, inputs, config_patches=patches or None)
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


def load_cpp(source: str) -> Any:
    """Compile C++ as Inductor does, once for all processes, and load it with ctypes."""
    return CppCodeCache.load(source)
