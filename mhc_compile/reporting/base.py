"""Rendering of results: a result class is data, and a module next to it registers how to print it.

    results.py     class Explanation(Renderable): ...
    tables.py      @render.register(Explanation)
                   def _explanation(result: Explanation, *, every: bool = False) -> Group: ...
    __init__.py    from mhc_compile.inspection.explain import tables  # registers the renderers

`tables` imports `results`, never the reverse: wherever a result's class can be imported, also after
unpickling, it has its renderer. `export` is the same for other media.
"""

from __future__ import annotations

import io
import math
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'


@singledispatch
def render(result: object, **settings: Any) -> RenderableType:  # noqa: ARG001 - keywords of the renderers
    """Return the text of a result for a terminal; `settings` are keywords of its renderer.

    A class without a registered renderer is a TypeError.
    """
    kind = type(result)
    raise TypeError(
        f"no renderer is registered for {kind.__module__}.{kind.__qualname__}; expected a function"
        " decorated with render.register in a module that its package imports"
    )


@singledispatch
def export(result: object, medium: str) -> Any:
    """Return the text of a file ("html", "svg", "dot", "mermaid"), or a figure ("png")."""
    raise TypeError(f"no {medium} is registered for {type(result).__name__}")


class Renderable:
    """Base class of results that rich prints and that a notebook shows."""

    def __rich__(self) -> RenderableType:
        """Return the registered rendering, for a rich console."""
        return render(self)

    def _repr_html_(self) -> str:
        """Return the same text as HTML with inline colours, for a notebook."""
        console = Console(record=True, file=io.StringIO(), width=110, highlight=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format=_HTML)


def fact_table(rows: Iterable[tuple[str, str]], style: str = "dim") -> Table:
    """Return a table of names, in `style`, and texts, without the rows whose text is empty."""
    columns = Column(style=style, no_wrap=True), Column(overflow="fold")
    table = Table(*columns, box=None, show_header=False, padding=(0, 1, 0, 0))
    for name, text in rows:
        if text:  # as Text: in a string, rich reads the brackets of a shape as a style
            table.add_row(name, Text(text))
    return table


def counted(number: int, noun: str) -> str:
    """Return "1 graph", "2 graphs"."""
    return f"{number} {noun}{'s'[: number != 1]}"


def finite(value: Any) -> Any:
    """Return nested data for JSON: numbers that are not finite are None, and tuples are lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
