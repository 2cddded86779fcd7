"""All private torch names that this package uses; `README.md` lists each with its purpose.

Checked on torch 2.13.0 (CPU). A name that a version of torch lacks fails here, with the version in
the message, and nowhere else. Names that a module takes over from torch are written `X as X`.

The modules load Dynamo. They are imported when one of their names is first used, because `mhc run`
imports this package into scripts that may compile nothing.
"""

# ruff: noqa: F403 - all public names of the modules

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

#: The module that `torch.export.export` imports when it is called first.
EXPORT_MODULE = "torch.export._trace"

if TYPE_CHECKING:
    from mhc_compile._torch.calls import *
    from mhc_compile._torch.distributed import *
    from mhc_compile._torch.dynamo import *
    from mhc_compile._torch.fx import *
    from mhc_compile._torch.guards import *
    from mhc_compile._torch.inductor import *
    from mhc_compile._torch.logging import *
    from mhc_compile._torch.modes import *
    from mhc_compile._torch.modules import *
    from mhc_compile._torch.optim import *
else:  # mypy would take a `__getattr__` for any name
    _MODULES = ("calls", "distributed", "dynamo", "fx", "guards", "inductor", "logging", "modes", "modules", "optim")

    def __getattr__(name: str) -> Any:
        if name.startswith("__") or name in (*_MODULES, "program"):  # `program` is imported without Dynamo
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            modules = [importlib.import_module(f"{__name__}.{module}") for module in _MODULES]
        except ImportError as error:  # pragma: no cover - depends on the torch that is installed
            import torch

            raise ImportError(
                f"mhc_compile works with torch 2.11 to 2.13; torch {torch.__version__} lacks what it needs: {error}"
            ) from error
        for module in modules:
            if name in vars(module):
                return globals().setdefault(name, vars(module)[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
