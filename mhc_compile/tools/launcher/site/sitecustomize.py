"""Loaded by every Python below `mhc run`, before the script: wait for torch, then set the backend.

Before torch is imported, only modules that Python has loaded already are used: files next to the
script may have names of the standard library. Another `sitecustomize`, which this one hides, is
loaded at the end.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_CONFIG = os.environ.get("MHC_RUN", "")
_PID, _PREFIX, _IDLE = [*_CONFIG.split("\n"), "", "", ""][:3]


class After:
    """A meta path finder that finds nothing, and calls `then(module)` once `name` is imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec of the other finders, as `importlib.abc.MetaPathFinder` asks for."""
        if name != self.name:
            return None
        self.name = ""  # the others are asked now, and one of them may ask all of them in turn
        try:
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in sys.meta_path)), None)
        finally:
            self.name = name
        if spec is not None:
            self._follow(spec.loader)  # stays in place: the caller may only ask whether the module exists
        return spec

    def _follow(self, loader: Any) -> None:
        plain = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # restores the loader
            plain(module)
            sys.meta_path.remove(self)
            self.then(module)

        loader.exec_module = exec_module


def _with_torch(torch: ModuleType) -> None:
    """Activate this copy of the package, even if the script would find another one."""
    import importlib.util

    if "mhc_compile" not in sys.modules:
        root = _HERE.removesuffix(os.path.join(os.sep, "tools", "launcher", "site"))
        spec = importlib.util.spec_from_file_location(
            "mhc_compile", os.path.join(root, "__init__.py"), submodule_search_locations=[root]
        )
        assert spec is not None
        assert spec.loader is not None
        package = sys.modules["mhc_compile"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    from mhc_compile.tools.launcher.activation import activate

    activate(torch, _CONFIG, After)


def _at_exit() -> None:
    # Nothing is imported here. After a KeyboardInterrupt Python must end by that signal; it forgets
    # this when it runs code from a string, as dataclasses do.
    activation = sys.modules.get("mhc_compile.tools.launcher.activation")
    if activation is not None:
        activation.report_at_exit()
    elif _IDLE and str(os.getpid()) == _PID and os.environ.get("RANK", "0") == "0" and not hasattr(sys, "last_type"):
        stderr: Any = sys.__stderr__
        try:
            stderr.write(_IDLE + "\n")
            stderr.flush()
        except (AttributeError, OSError, ValueError):  # there is none, or the script closed it
            pass


def _load_hidden() -> None:
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["sitecustomize"])


sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
if _CONFIG and sys.prefix == _PREFIX:  # Pythons of other environments may have no mhc_compile, or another torch
    import atexit

    atexit.register(_at_exit)  # the first to be registered is the last to run
    if "torch" in sys.modules:
        _with_torch(sys.modules["torch"])
    else:
        After("torch", _with_torch)
_load_hidden()
