"""Presets: the conventions of the systems that ship hyper-connections.

A new one is one file and one line here. Torch is not imported here.
"""

from __future__ import annotations

import difflib

from mhc_compile.config.presets.base import Preset, ReadOut
from mhc_compile.config.presets.deepseek_v4 import DEEPSEEK_V4
from mhc_compile.config.presets.deepseek_v4_1 import DEEPSEEK_V4_1
from mhc_compile.config.presets.glm5_next import GLM5_NEXT
from mhc_compile.config.presets.hy_v4 import HY_V4
from mhc_compile.config.presets.liger import LIGER
from mhc_compile.config.presets.paper import PAPER
from mhc_compile.config.presets.qwen4_exp import QWEN4_EXP
from mhc_compile.errors import OptionError

__all__ = ["PRESETS", "Preset", "ReadOut", "get_preset", "register_preset"]

#: By name.
PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (PAPER, DEEPSEEK_V4, DEEPSEEK_V4_1, GLM5_NEXT, HY_V4, LIGER, QWEN4_EXP)
}


def get_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        OptionError: there is none; the message gives the nearest name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"preset {name!r} is unknown; {hint}known presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def register_preset(preset: Preset) -> Preset:
    """Makes a preset of your own known by its name, to `options={"preset": ...}` and to the commands' `--preset`.

    Raises:
        OptionError: another preset has that name.
    """
    if PRESETS.setdefault(preset.name, preset) != preset:
        raise OptionError(f"preset {preset.name!r} exists already and is another one; choose another name")
    return preset
