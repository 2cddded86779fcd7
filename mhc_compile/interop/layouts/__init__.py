"""Layouts by preset. To add one, write a file like its neighbours and list it here. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.config.presets import get_preset
from mhc_compile.errors import OptionError
from mhc_compile.interop.layouts.deepseek_v4 import DEEPSEEK_V4
from mhc_compile.interop.layouts.glm5_next import GLM5_NEXT
from mhc_compile.interop.layouts.hy_v4 import HY_V4
from mhc_compile.interop.layouts.qwen4_exp import QWEN4_EXP

if TYPE_CHECKING:
    from mhc_compile.interop.layout import Layout

__all__ = ["LAYOUTS", "get_layout", "register_layout"]

#: By the name of the preset.
LAYOUTS: dict[str, Layout] = {layout.preset: layout for layout in (DEEPSEEK_V4, GLM5_NEXT, HY_V4, QWEN4_EXP)}


def get_layout(preset: str) -> Layout:
    """Return the layout of the system that `preset` stands for.

    Raises:
        OptionError: there is no such preset, or it has no layout.
    """
    get_preset(preset)
    if preset not in LAYOUTS:
        raise OptionError(
            f"preset {preset!r} has no layout of its own; known layouts: {', '.join(LAYOUTS)}. Add one with"
            " mhc_compile.interop.layouts.register_layout"
        )
    return LAYOUTS[preset]


def register_layout(layout: Layout) -> Layout:
    """Add a layout under the name of its preset, and return it.

    Raises:
        OptionError: there is no such preset (see `register_preset`), or it has another layout.
    """
    get_preset(layout.preset)
    if LAYOUTS.setdefault(layout.preset, layout) != layout:
        raise OptionError(
            f"preset {layout.preset!r} has another layout already; register a preset with a name of its own"
        )
    return layout
