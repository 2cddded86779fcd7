"""A drawing for Graphviz."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.inspection.diff.flow import flow
from mhc_compile.inspection.diff.sketch import sketch

if TYPE_CHECKING:
    from mhc_compile.inspection.diff.flow import Arrow, Box, Flow, Shape
    from mhc_compile.inspection.diff.model_diff import ModelDiff

__all__ = ["to_dot"]

_LOOKS: dict[Shape, str] = {
    "end": 'shape=plain, fontcolor="#59636e"',
    "branch": 'shape=box, style="rounded,filled", fillcolor="#f6f8fa", color="#8b949e"',
    "add": 'shape=box, style="rounded,filled", fillcolor="#dff3f6", color="#0a8296", margin="0.08,0.02", height=0.25',
    "lifted": 'shape=box, style=filled, fillcolor="#f7e9f8", color="#8a2a8c", margin="0.08,0.02", height=0.25',
    "repeat": 'shape=box, style=dashed, color="#59636e"',
    "note": 'shape=note, color="#8b949e", fontcolor="#59636e", fontsize=9',
}


def to_dot(diff: ModelDiff) -> str:
    """The drawing in Graphviz's language: `dot -Tsvg` lays it out."""
    drawn = sketch(diff)
    lines = [
        "digraph mhc {",
        f"  label={_quoted(drawn.title)}; labelloc=t; fontname=Helvetica; newrank=true; nodesep=0.35; ranksep=0.3;",
        '  node [fontname=Helvetica, fontsize=10]; edge [fontname=Helvetica, fontsize=9, color="#59636e", arrowsize=0.6];',
    ]
    for number, side in enumerate(flow(drawn)):
        lines += _cluster(number, side, drawn.streams)
    if not drawn.pictures:
        lines.append(f"  nothing [label={_quoted(drawn.description)}, {_LOOKS['end']}];")
    return "\n".join([*lines, "}", ""])


def _cluster(number: int, side: Flow, streams: int) -> list[str]:
    inside = [_box(box) for box in side.boxes] + [_arrow(arrow, streams) for arrow in side.arrows]
    return [f"  subgraph cluster_{number} {{", f'    label={_quoted(side.title)}; color="#d0d7de";', *inside, "  }"]


def _box(box: Box) -> str:
    return f"    {box.name} [label={_quoted(*box.lines)}, {_LOOKS[box.shape]}];"


def _arrow(arrow: Arrow, streams: int) -> str:
    looks = []
    if arrow.label:
        looks.append(f"label={_quoted(arrow.label)}")
    if arrow.hidden:
        looks.append("style=invis")
    if arrow.streams:  # a list of colours draws parallel lines
        looks.append(f'color="{":invis:".join(["#0a8296"] * streams)}"')
    attributes = f" [{', '.join(looks)}]" if looks else ""
    return f"    {arrow.start} -> {arrow.end}{attributes};"


def _quoted(*lines: str) -> str:
    """A string in which every character stands for itself. Graphviz reads entities of HTML in labels too."""
    escaped = (
        line.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ").replace("\r", " ")
        for line in lines
    )
    return '"' + "\\n".join(escaped) + '"'
