"""The difference between a model's graphs before and after the rewrite, as data and as pictures.

    dry_run, passes -> views: FX graphs as `NodeView`s -> compare: `Row`s with a `Change` each
                    -> results: `ModelDiff` -> text, page, drawing, drawing_svg

The plan is the one that `explain` reports and that the backend follows; the passes are the
backend's. Nothing here decides what is rewritten.
"""

from mhc_compile.inspection.diff import drawing, drawing_svg, page, text  # noqa: F401 - registers
from mhc_compile.inspection.diff.results import ModelDiff
from mhc_compile.reporting.base import export

_MEDIA = {"html": page.render_page, "svg": drawing_svg.to_svg, "dot": drawing.to_dot, "mermaid": drawing.to_mermaid}


@export.register(ModelDiff)
def _export(diff: ModelDiff, medium: str) -> str:
    return _MEDIA[medium](diff)
