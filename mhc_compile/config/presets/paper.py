"""The paper's own convention, and the default."""

from mhc_compile.config.presets.base import Preset

PAPER = Preset(name="paper", source="arXiv 2512.24880 v2, equations 5 to 9")
