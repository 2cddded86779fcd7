"""HTML of a result for notebooks: the text of the terminal in one `<pre>` element."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["html_of"]

_WIDTH = 110
_FORMAT = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'


def html_of(renderable: RenderableType, *, width: int = _WIDTH) -> str:
    """Return `renderable` as standalone HTML: one `<pre>` element with inline colours.

    Args:
        renderable: anything that rich prints.
        width: characters per line.
    """
    console = Console(record=True, file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_FORMAT)
