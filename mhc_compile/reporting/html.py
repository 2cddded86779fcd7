"""HTML of a result for notebooks: the text of the terminal in one `<pre>` element."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType

_FORMAT = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'


def html_of(renderable: RenderableType) -> str:
    """Return `renderable` as standalone HTML with inline colours, 110 characters a line."""
    console = Console(record=True, file=io.StringIO(), width=110, highlight=False)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_FORMAT)
