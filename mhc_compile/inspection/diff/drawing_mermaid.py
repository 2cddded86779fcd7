"""A drawing for Markdown: GitHub and many others draw Mermaid in a fenced block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.inspection.diff.flow import flow
from mhc_compile.inspection.diff.sketch import sketch

if TYPE_CHECKING:
    from mhc_compile.inspection.diff.flow import Arrow, Box, Shape
    from mhc_compile.inspection.diff.model_diff import ModelDiff

__all__ = ["to_mermaid"]

_BRACKETS: dict[Shape, tuple[str, str]] = {
    "end": ("([", "])"),
    "branch": ("[", "]"),
    "add": ("((", "))"),
    "lifted": ("[", "]"),
    "repeat": ("[[", "]]"),
    "note": (">", "]"),
}
#: Of these the language makes something else than themselves, in a quoted text.
_ESCAPED = frozenset('#&<>"`\\\n\r\u2028\u2029')


def to_mermaid(diff: ModelDiff) -> str:
    """The drawing in Mermaid's language, without the fence."""
    drawn = sketch(diff)
    lines = ["flowchart TB", f"  accTitle: {_plain(drawn.title)}", f"  accDescr: {_plain(drawn.description)}"]
    for number, side in enumerate(flow(drawn)):
        lines.append(f"  subgraph s{number}[{_quoted(side.title)}]")
        lines += [f"    {_box(box)}" for box in side.boxes]
        lines += [f"    {_arrow(arrow, drawn.streams)}" for arrow in side.arrows]
        lines.append("  end")
    if not drawn.pictures:
        lines.append(f"  nothing[{_quoted(drawn.description)}]")
    lines.append("  classDef note stroke-dasharray:3 3,fill:none")
    return "\n".join([*lines, ""])


def _box(box: Box) -> str:
    opening, closing = _BRACKETS[box.shape]
    mark = ":::note" if box.shape in {"note", "repeat"} else ""
    return f"{box.name}{opening}{_quoted(*box.lines)}{closing}{mark}"


def _arrow(arrow: Arrow, streams: int) -> str:
    if arrow.hidden:
        return f"{arrow.start} ~~~ {arrow.end}"
    if not arrow.streams:
        return f"{arrow.start} -->{f'|{arrow.label}|' if arrow.label else ''} {arrow.end}"
    label = f"{arrow.label}, {streams} streams" if arrow.label else f"{streams} streams"
    return f"{arrow.start} ==>|{label}| {arrow.end}"


def _quoted(*lines: str) -> str:
    return f'"{"<br/>".join(map(_escaped, lines))}"'


def _escaped(text: str) -> str:
    return "".join(f"#{ord(letter)};" if letter in _ESCAPED else letter for letter in text)


def _plain(text: str) -> str:
    """For titles, which know no escapes and end with their line."""
    return "".join(letter if letter.isalnum() or letter in " .,:;'-" else " " for letter in text).replace(";", ",")
