"""Inductor: its compiler, its code, its settings and caches."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import decompositions as inductor_decompositions
from torch._inductor.decomposition import fast_random_decomps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


__all__ = [
    "cache_folder",
    "compile_with_inductor",
    "cpp_compiler",
    "inductor_code",
    "inductor_settings",
    "inner_backend",
    "load_cpp",
]


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


def load_cpp(source: str) -> Any:
    """Compiles C++ with Inductor's compiler and flags, once for all processes, and loads it with ctypes."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source)
