"""Manifold-Constrained Hyper-Connections (mHC) for any PyTorch model: `torch.compile(model, backend="mhc")`.

Importing this package is cheap: torch is imported on first use of a name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mhc_compile.config.options import Options
from mhc_compile.errors import (
    AttachError,
    CaptureError,
    CheckpointError,
    MhcError,
    MhcWarning,
    NothingRewrittenError,
    OptionError,
    ShapeError,
    StreamsLostError,
    UnknownAddError,
)

if TYPE_CHECKING:
    from mhc_compile.attachment.parameter_groups import parameter_groups
    from mhc_compile.attachment.sites import connections, detach
    from mhc_compile.backend import mhc
    from mhc_compile.checkpoints.load import load_state_dict
    from mhc_compile.checkpoints.restore import restore
    from mhc_compile.compilation.attach import attach
    from mhc_compile.eager_mode import eager
    from mhc_compile.export.rewrite import rewrite
    from mhc_compile.inspection.diff.compare import diff
    from mhc_compile.inspection.diff.results import ModelDiff
    from mhc_compile.inspection.explain.explain import Explanation, explain
    from mhc_compile.inspection.explain.story import Story
    from mhc_compile.inspection.explain.why import why
    from mhc_compile.inspection.stream_stats.measure import stability
    from mhc_compile.inspection.stream_stats.results import Stability
    from mhc_compile.inspection.verification.check import check
    from mhc_compile.inspection.verification.results import CheckResult
    from mhc_compile.integrations.accelerate import register_with_accelerate
    from mhc_compile.integrations.callbacks import StabilityCallback
    from mhc_compile.mappings import ResidualMapping, register_mapping
    from mhc_compile.modules.hyper_connection import HyperConnection

__version__ = "0.1.0"

__all__ = [
    "AttachError",
    "CaptureError",
    "CheckResult",
    "CheckpointError",
    "Explanation",
    "HyperConnection",
    "MhcError",
    "MhcWarning",
    "ModelDiff",
    "NothingRewrittenError",
    "OptionError",
    "Options",
    "ResidualMapping",
    "ShapeError",
    "Stability",
    "StabilityCallback",
    "Story",
    "StreamsLostError",
    "UnknownAddError",
    "attach",
    "check",
    "connections",
    "detach",
    "diff",
    "eager",
    "explain",
    "load_state_dict",
    "mhc",
    "parameter_groups",
    "register_mapping",
    "register_with_accelerate",
    "restore",
    "rewrite",
    "stability",
    "why",
]

_HOMES = {
    "CheckResult": "inspection.verification.results",
    "Explanation": "inspection.explain.explain",
    "HyperConnection": "modules.hyper_connection",
    "ResidualMapping": "mappings",
    "ModelDiff": "inspection.diff.results",
    "Stability": "inspection.stream_stats.results",
    "StabilityCallback": "integrations.callbacks",
    "Story": "inspection.explain.story",
    "attach": "compilation.attach",
    "check": "inspection.verification.check",
    "connections": "attachment.sites",
    "detach": "attachment.sites",
    "diff": "inspection.diff.compare",
    "eager": "eager_mode",
    "explain": "inspection.explain.explain",
    "load_state_dict": "checkpoints.load",
    "mhc": "backend",
    "parameter_groups": "attachment.parameter_groups",
    "register_mapping": "mappings",
    "register_with_accelerate": "integrations.accelerate",
    "restore": "checkpoints.restore",
    "rewrite": "export.rewrite",
    "stability": "inspection.stream_stats.measure",
    "why": "inspection.explain.why",
}


def __getattr__(name: str) -> Any:
    """Loads the public names that need torch when they are first used."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
