"""Drawings of a `ModelDiff`: the residual trunk before, and its streams after. All are made from the same `sketch`."""

from mhc_compile.inspection.diff.drawing_dot import to_dot
from mhc_compile.inspection.diff.drawing_mermaid import to_mermaid
from mhc_compile.inspection.diff.drawing_svg import to_svg

__all__ = ["to_dot", "to_mermaid", "to_svg"]
