"""Drawings in languages that lay out boxes and arrows themselves: Graphviz and Mermaid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from mhc_compile.inspection.diff.picture import sketch

if TYPE_CHECKING:
    from mhc_compile.inspection.diff.picture import Sketch, Trunk
    from mhc_compile.inspection.diff.results import ModelDiff

#: By kind of box: attributes of Graphviz, and brackets of Mermaid.
_SHAPES = {
    "end": ('shape=plain, fontcolor="#59636e"', "([", "])"),
    "site": ('shape=box, style="rounded,filled", fillcolor="#f6f8fa", color="#8b949e"', "[", "]"),
    "add": (
        'shape=box, style="rounded,filled", fillcolor="#dff3f6", color="#0a8296", margin="0.08,0.02", height=0.25',
        "((",
        "))",
    ),
    "lifted": (
        'shape=box, style=filled, fillcolor="#f7e9f8", color="#8a2a8c", margin="0.08,0.02", height=0.25',
        "[",
        "]",
    ),
    "repeat": ('shape=box, style=dashed, color="#59636e"', "[[", "]]"),
    "note": ('shape=note, color="#8b949e", fontcolor="#59636e", fontsize=9', ">", "]"),
}
#: Characters with a meaning in a quoted text of Mermaid.
_MERMAID_ESCAPED = frozenset('#&<>"`\\\n\r\u2028\u2029')


class _Arrow(NamedTuple):
    """An arrow between two boxes, by name. It carries all streams, or is hidden and only orders."""

    start: str
    end: str
    label: str = ""
    kind: Literal["", "streams", "hidden"] = ""


@dataclass
class _Flow:
    """One side of one graph: its boxes (name, shape, lines of text) and its arrows."""

    title: str
    prefix: str
    boxes: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    arrows: list[_Arrow] = field(default_factory=list)

    def box(self, shape: str, *lines: str) -> str:
        """Add a box and return its name."""
        name = f"{self.prefix}_{len(self.boxes)}"
        self.boxes.append((name, shape, tuple(filter(None, lines))))
        return name


def _flows(drawn: Sketch) -> list[_Flow]:
    """Return two flows for each graph, before and after; one where nothing is rewritten."""
    flows = []
    for number, picture in enumerate(drawn.pictures):
        where = f" ({picture.title})" if len(drawn.pictures) > 1 else ""
        before, after = _Flow(f"before{where}", f"b{number}"), _Flow(f"after{where}", f"a{number}")
        for trunk in picture.trunks:
            _draw(trunk, before, drawn.streams, after=False)
            _draw(trunk, after, drawn.streams, after=True)
        if picture.notes:
            last = before.boxes[-1][0] if before.boxes else ""
            note = before.box("note", *picture.notes)
            before.arrows += [_Arrow(last, note, kind="hidden")] * bool(last)
        flows += [before, after]
    return [flow for flow in flows if flow.boxes]


def _draw(trunk: Trunk, flow: _Flow, streams: int, *, after: bool) -> None:
    start, end = trunk.ends(streams, after=after)
    pre, res, post, add = ("pre", "res", "post", "hyper-connection") if after else ("", "", "", "add")
    trunk_kind: Literal["", "streams"] = "streams" if after else ""
    at = flow.box("end", start)
    for part in trunk.parts:
        box = flow.box(part.kind, *part.lines)
        if part.kind == "site":
            join = flow.box("add", add)
            flow.arrows += [_Arrow(at, box, pre), _Arrow(at, join, res, trunk_kind), _Arrow(box, join, post)]
            at = join
        else:
            flow.arrows.append(_Arrow(at, box, kind=trunk_kind))
            at = box
    flow.arrows.append(_Arrow(at, flow.box("end", end), kind=trunk_kind))


def to_dot(diff: ModelDiff) -> str:
    """Return the drawing in Graphviz's language: `dot -Tsvg` lays it out."""
    drawn = sketch(diff)
    lines = [
        "digraph mhc {",
        f"  label={_dot_text(drawn.title)}; labelloc=t; fontname=Helvetica; newrank=true; nodesep=0.35; ranksep=0.3;",
        '  node [fontname=Helvetica, fontsize=10]; edge [fontname=Helvetica, fontsize=9, color="#59636e", arrowsize=0.6];',
    ]
    for number, flow in enumerate(_flows(drawn)):
        lines += [f"  subgraph cluster_{number} {{", f'    label={_dot_text(flow.title)}; color="#d0d7de";']
        lines += [f"    {name} [label={_dot_text(*text)}, {_SHAPES[shape][0]}];" for name, shape, text in flow.boxes]
        lines += [f"    {_dot_arrow(arrow, drawn.streams)};" for arrow in flow.arrows]
        lines.append("  }")
    if not drawn.pictures:
        lines.append(f"  nothing [label={_dot_text(drawn.description)}, {_SHAPES['end'][0]}];")
    return "\n".join([*lines, "}", ""])


def _dot_arrow(arrow: _Arrow, streams: int) -> str:
    looks = []
    if arrow.label:
        looks.append(f"label={_dot_text(arrow.label)}")
    if arrow.kind == "hidden":
        looks.append("style=invis")
    if arrow.kind == "streams":  # a list of colours draws parallel lines
        looks.append(f'color="{":invis:".join(["#0a8296"] * streams)}"')
    return f"{arrow.start} -> {arrow.end}" + (f" [{', '.join(looks)}]" if looks else "")


def _dot_text(*lines: str) -> str:
    """Return a quoted string in which every character stands for itself, also as HTML entity."""
    escapes = str.maketrans({"&": "&amp;", "\\": "\\\\", '"': '\\"', "\n": " ", "\r": " "})
    return '"' + "\\n".join(line.translate(escapes) for line in lines) + '"'


def to_mermaid(diff: ModelDiff) -> str:
    """Return the drawing in Mermaid's language, without the fence of the Markdown block."""
    drawn = sketch(diff)
    lines = ["flowchart TB", f"  accTitle: {_plain(drawn.title)}", f"  accDescr: {_plain(drawn.description)}"]
    for number, flow in enumerate(_flows(drawn)):
        lines.append(f"  subgraph s{number}[{mermaid_text(flow.title)}]")
        for name, shape, text in flow.boxes:
            _, opening, closing = _SHAPES[shape]
            mark = ":::note" if shape in {"note", "repeat"} else ""
            lines.append(f"    {name}{opening}{mermaid_text(*text)}{closing}{mark}")
        lines += [f"    {_mermaid_arrow(arrow, drawn.streams)}" for arrow in flow.arrows]
        lines.append("  end")
    if not drawn.pictures:
        lines.append(f"  nothing[{mermaid_text(drawn.description)}]")
    lines.append("  classDef note stroke-dasharray:3 3,fill:none")
    return "\n".join([*lines, ""])


def _mermaid_arrow(arrow: _Arrow, streams: int) -> str:
    line = {"": "-->", "streams": "==>", "hidden": "~~~"}[arrow.kind]
    label = ", ".join(filter(None, (arrow.label, f"{streams} streams" * (arrow.kind == "streams"))))
    return f"{arrow.start} {line}{f'|{label}|' * bool(label)} {arrow.end}"


def mermaid_text(*lines: str) -> str:
    """Return a quoted text in which every character stands for itself."""
    escaped = ("".join(f"#{ord(c)};" if c in _MERMAID_ESCAPED else c for c in line) for line in lines)
    return f'"{"<br/>".join(escaped)}"'


def _plain(text: str) -> str:
    """Return a title without special characters: titles have no escapes and end with their line."""
    return "".join(letter if letter.isalnum() or letter in " .,:;'-" else " " for letter in text).replace(";", ",")
