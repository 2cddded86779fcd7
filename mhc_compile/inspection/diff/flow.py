"""A `Sketch` as boxes and arrows, for the languages that lay out boxes and arrows themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mhc_compile.inspection.diff.sketch import Lifted, Place, Repeat

if TYPE_CHECKING:
    from mhc_compile.inspection.diff.sketch import Picture, Sketch, Trunk

__all__ = ["Arrow", "Box", "Flow", "Shape", "flow"]

Shape = Literal["end", "branch", "add", "lifted", "repeat", "note"]


@dataclass(frozen=True)
class Box:
    """A box: its name in the drawing, its shape, and its lines of text."""

    name: str
    shape: Shape
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Arrow:
    """From box to box by name. On streams it carries all of them; a hidden one only says what stands below what."""

    start: str
    end: str
    label: str = ""
    streams: bool = False
    hidden: bool = False


@dataclass
class Flow:
    """One side of one graph."""

    title: str
    prefix: str
    boxes: list[Box] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)

    def box(self, shape: Shape, *lines: str) -> str:
        """Adds a box and gives its name."""
        name = f"{self.prefix}_{len(self.boxes)}"
        self.boxes.append(Box(name, shape, tuple(line for line in lines if line)))
        return name

    def arrow(self, start: str, end: str, label: str = "", *, streams: bool = False) -> None:
        """Adds an arrow."""
        self.arrows.append(Arrow(start, end, label, streams))

    def below(self, *lines: str) -> None:
        """Adds a note below everything else."""
        last = self.boxes[-1].name if self.boxes else ""
        note = self.box("note", *lines)
        if last:
            self.arrows.append(Arrow(last, note, hidden=True))


def flow(sketch: Sketch) -> tuple[Flow, ...]:
    """Two flows for each graph, before and after; where nothing is rewritten, one with what is left alone."""
    flows = []
    for number, picture in enumerate(sketch.pictures):
        where = f" ({picture.title})" if len(sketch.pictures) > 1 else ""
        flows.append(_side(picture, Flow(f"before{where}", f"b{number}"), 1))
        flows.append(_side(picture, Flow(f"after{where}", f"a{number}"), sketch.streams))
    return tuple(side for side in flows if side.boxes)


def _side(picture: Picture, drawn: Flow, streams: int) -> Flow:
    for trunk in picture.trunks:
        _trunk(trunk, drawn, streams)
    if picture.notes and drawn.prefix.startswith("b"):
        drawn.below(*(note.text for note in picture.notes))
    return drawn


def _trunk(trunk: Trunk, drawn: Flow, streams: int) -> None:
    many = drawn.prefix.startswith("a")
    at = drawn.box("end", *start_text(trunk, streams, many=many))
    for part in trunk.parts:
        if isinstance(part, Place):
            branch = drawn.box("branch", *place_text(part))
            add = drawn.box("add", "hyper-connection" if many else "add")
            drawn.arrow(at, branch, "pre" if many else "")
            drawn.arrow(at, add, "res" if many else "", streams=many)
            drawn.arrow(branch, add, "post" if many else "")
            at = add
            continue
        box = drawn.box("lifted" if isinstance(part, Lifted) else "repeat", part_text(part))
        drawn.arrow(at, box, streams=many)
        at = box
    drawn.arrow(at, drawn.box("end", end_text(trunk, streams, many=many)), streams=many)


def place_text(place: Place) -> tuple[str, ...]:
    """The lines in a site's box."""
    more = []
    if place.adds > 1:
        more.append(f"{place.adds} additions in one")
    if place.holds:
        more.append(f"holds {place.holds} more sites")
    return place.label, place.kind, *more


def part_text(part: Lifted | Repeat) -> str:
    """What stands in any other box on the trunk."""
    return part.label if isinstance(part, Lifted) else f"× {part.count}: as {part.like}"


def start_text(trunk: Trunk, streams: int, *, many: bool) -> tuple[str, ...]:
    """What stands where the trunk begins."""
    if not many:
        return (f"trunk, C = {trunk.width}",)
    return (f"{streams} streams arrive" if trunk.arrives else f"copies: 1 → {streams}",)


def end_text(trunk: Trunk, streams: int, *, many: bool) -> str:
    """What stands where the trunk ends."""
    if not many:
        return "goes on in another graph" if trunk.departs else "end"
    return f"{streams} streams go on" if trunk.departs else f"mean: {streams} → 1"
