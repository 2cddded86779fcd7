"""Loaded by every Python below `mhc run`, before the script: waits for torch, then sets the default backend.

Nothing but modules that Python has loaded by now is imported before torch is: a script may have files beside it that are called like modules of the
standard library. Another `sitecustomize`, hidden by this one, is loaded in its place.
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
_ORDER = os.environ.get("MHC_RUN", "")
_PID, _PREFIX, _IDLE = [*_ORDER.split("\n"), "", "", ""][:3]


class After:
    """Calls `then(module)` once the module `name` has been imported. Finds nothing itself."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What the other finders find; see `importlib.abc.MetaPathFinder`."""
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            self._follow(spec.loader)  # perhaps somebody only asks whether there is such a module, and will ask again
        return spec

    def _follow(self, loader: Any) -> None:
        plain = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # from here on the loader is as it was
            plain(module)
            sys.meta_path.remove(self)
            self.then(module)

        loader.exec_module = exec_module


def _with_torch(torch: ModuleType) -> None:
    """Hands over to this very copy of the package, wherever the script would find another."""
    import importlib.util

    if "mhc_compile" not in sys.modules:
        root = os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))
        spec = importlib.util.spec_from_file_location(
            "mhc_compile", os.path.join(root, "__init__.py"), submodule_search_locations=[root]
        )
        assert spec is not None
        assert spec.loader is not None
        package = sys.modules["mhc_compile"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    from mhc_compile.tools.launcher.activation import activate

    activate(torch, _ORDER, After)


def _at_exit() -> None:
    # Nothing is imported here: that a KeyboardInterrupt ended the script, and is to end the process by its signal, is forgotten by Python when it
    # runs code from a string, as the modules of dataclasses do.
    activation = sys.modules.get("mhc_compile.tools.launcher.activation")
    if activation is not None:
        activation.say_last()
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
if _ORDER and sys.prefix == _PREFIX:  # Pythons of other environments may have no mhc_compile, or another torch
    import atexit

    atexit.register(_at_exit)  # the first to be registered is the last to run
    if "torch" in sys.modules:
        _with_torch(sys.modules["torch"])
    else:
        After("torch", _with_torch)
_load_hidden()
