"""Manifold-Constrained Hyper-Connections (mHC) for any PyTorch model.

    torch.compile(model, backend="mhc")

Importing this package is cheap: torch is imported on first use of a name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mhc_compile.config.options import Options
from mhc_compile.config.presets import Preset, register_preset
from mhc_compile.errors import MhcError, MhcWarning
from mhc_compile.integrations.saving import watch

if TYPE_CHECKING:
    from mhc_compile.attachment.model_tree import connections
    from mhc_compile.attachment.parameter_groups import parameter_groups
    from mhc_compile.attachment.plan import Plan
    from mhc_compile.attachment.sites import detach
    from mhc_compile.backend import mhc
    from mhc_compile.checkpoints.load import load_state_dict
    from mhc_compile.checkpoints.restore import restore
    from mhc_compile.compilation.attach import attach, plan
    from mhc_compile.construction.planned_class import planned
    from mhc_compile.eager_mode import eager, plain
    from mhc_compile.export.rewrite import rewrite
    from mhc_compile.inspection.audit import audit
    from mhc_compile.inspection.diff.compare import diff
    from mhc_compile.inspection.explain.explain import explain
    from mhc_compile.inspection.explain.why import why
    from mhc_compile.inspection.stream_stats.measure import stability
    from mhc_compile.inspection.verification.check import check
    from mhc_compile.mappings import ResidualMapping, register_mapping
    from mhc_compile.modules.hyper_connection import HyperConnection

__version__ = "0.1.0"

#: The public names that need torch, each with its module.
_HOMES = {
    "HyperConnection": "modules.hyper_connection",
    "Plan": "attachment.plan",
    "ResidualMapping": "mappings",
    "attach": "compilation.attach",
    "audit": "inspection.audit",
    "check": "inspection.verification.check",
    "connections": "attachment.model_tree",
    "detach": "attachment.sites",
    "diff": "inspection.diff.compare",
    "eager": "eager_mode",
    "explain": "inspection.explain.explain",
    "load_state_dict": "checkpoints.load",
    "mhc": "backend",
    "parameter_groups": "attachment.parameter_groups",
    "plain": "eager_mode",
    "plan": "compilation.attach",
    "planned": "construction.planned_class",
    "register_mapping": "mappings",
    "restore": "checkpoints.restore",
    "rewrite": "export.rewrite",
    "stability": "inspection.stream_stats.measure",
    "why": "inspection.explain.why",
}

__all__ = [
    "HyperConnection",
    "MhcError",
    "MhcWarning",
    "Options",
    "Plan",
    "Preset",
    "ResidualMapping",
    "attach",
    "audit",
    "check",
    "connections",
    "detach",
    "diff",
    "eager",
    "explain",
    "load_state_dict",
    "mhc",
    "parameter_groups",
    "plain",
    "plan",
    "planned",
    "register_mapping",
    "register_preset",
    "restore",
    "rewrite",
    "stability",
    "why",
]


watch()


def __getattr__(name: str) -> Any:
    """Load a public name that needs torch on its first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
