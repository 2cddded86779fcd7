"""A drawing as one SVG file: two columns, before and after, in a light and a dark style."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from mhc_compile.inspection.diff.picture import sketch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhc_compile.inspection.diff.picture import Part, Picture, Trunk
    from mhc_compile.inspection.diff.results import ModelDiff

_COLUMN = 400
_MARGIN = 20
#: Middle of the trunk and left edge of the branch's box in a column; width of the box.
_TRUNK, _BOX, _WIDE = 110, 190, 190
#: Letters that fit into a box and on a line of notes.
_LETTERS, _LINE = 24, 105
_TALL = {"end": 40, "site": 104, "lifted": 52, "repeat": 52}

_STYLE = """
  svg { --back: #fff; --ink: #1f2328; --dim: #59636e; --edge: #c3cad2; --box: #f6f8fa; --line: #8b949e; --stream: #0a8296; --mark: #fff; }
  @media (prefers-color-scheme: dark) {
    svg { --back: #14171b; --ink: #e2e6ea; --dim: #98a2ae; --edge: #3d444d; --box: #1f242b; --line: #77828e; --stream: #3fb5c9; --mark: #14171b; }
  }
  text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); text-anchor: middle; }
  .path { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
  .title { font-size: 15px; font-weight: 600; text-anchor: start; }
  .side { font-size: 13px; font-weight: 600; }
  .dim { fill: var(--dim); font-size: 11px; }
  .note { fill: var(--dim); font-size: 11px; text-anchor: start; }
  .back { fill: var(--back); }
  .box { fill: var(--box); stroke: var(--edge); }
  .on { fill: var(--back); stroke: var(--edge); }
  .repeat { fill: var(--back); stroke: var(--edge); stroke-dasharray: 4 3; }
  .trunk { stroke: var(--line); stroke-width: 2; }
  .stream { stroke: var(--stream); stroke-width: 1.75; }
  .way { stroke: var(--line); fill: none; stroke-width: 1.25; }
  .head { fill: var(--line); }
  .add { fill: var(--back); stroke: var(--line); stroke-width: 1.75; }
  .update { fill: var(--stream); }
  .rule { stroke: var(--edge); }
"""


def to_svg(diff: ModelDiff) -> str:
    """Return the drawing, which refers to no other file."""
    drawn = sketch(diff)
    body: list[str] = [_text(_MARGIN, 30, drawn.title, "title", 80)]
    top = 46
    for picture in drawn.pictures:
        if len(drawn.pictures) > 1:
            top += 24
            body.append(_text(_MARGIN, top - 8, f"graph of {picture.title}", "note"))
        lines, top = _picture(picture, top, drawn.streams)
        body += lines
    if not any(picture.trunks for picture in drawn.pictures):
        body.append(_text(_MARGIN, top + 24, "Nothing is rewritten.", "note"))
        top += 36
    width, height = 2 * _COLUMN + 2 * _MARGIN, top + _MARGIN
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title description">',
        f'<title id="title">{_escaped(drawn.title)}</title>',
        f'<desc id="description">{_escaped(drawn.description)}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="back" width="{width}" height="{height}" rx="6"/>',
    ]
    return "\n".join([*head, *body, "</svg>", ""])


def _picture(picture: Picture, top: int, streams: int) -> tuple[list[str], int]:
    body: list[str] = []
    if picture.trunks:
        middle = _MARGIN + _COLUMN
        bottom = top
        for after, left in ((False, _MARGIN), (True, middle)):
            body.append(_text(left + _COLUMN // 2, top + 20, "after" if after else "before", "side"))
            bottom = top + 36
            for trunk in picture.trunks:
                side = _Side(left, streams, after)
                body += ['<g class="chain">', *side.trunk(trunk, bottom), "</g>"]
                bottom = side.bottom + 20
        body.append(f'<line class="rule" x1="{middle}" y1="{top + 8}" x2="{middle}" y2="{bottom - 20}"/>')
        top = bottom
    for note in picture.notes:
        top += 18
        body.append(_text(_MARGIN, top, note, "note", _LINE))
    return body, top


class _Side:
    """Draws trunks into one column, from top to bottom."""

    def __init__(self, left: int, streams: int, after: bool) -> None:
        self.left, self.streams, self.after = left, streams, after
        self.x = left + _TRUNK
        self.pitch = min(7.0, 42 / max(1, streams - 1))
        self.half = self.pitch * (streams - 1) / 2 if after else 0.0
        self.bottom = 0

    def trunk(self, trunk: Trunk, top: int) -> Iterator[str]:
        heights = [_TALL[part.kind] for part in trunk.parts]
        end = top + _TALL["end"] + sum(heights)
        kind, count = ("stream", self.streams) if self.after else ("trunk", 1)
        for x in (self.x - self.half + self.pitch * line for line in range(count)):
            yield f'<line class="{kind}" x1="{x:g}" y1="{top + 22}" x2="{x:g}" y2="{end + 16}"/>'
        first, last = trunk.ends(self.streams, after=self.after)
        yield from self._pill(top + 4, first)
        at = top + _TALL["end"]
        for part, height in zip(trunk.parts, heights, strict=True):
            yield from self._site(part, at) if part.kind == "site" else self._on(part, at)
            at += height
        yield from self._pill(end + 12, last)
        self.bottom = end + _TALL["end"]

    def _pill(self, top: int, text: str) -> Iterator[str]:
        wide = 7 * min(len(text), 22) + 16
        yield f'<rect class="on" x="{self.x - wide / 2:g}" y="{top}" width="{wide}" height="20" rx="10"/>'
        yield _text(self.x, top + 14, text, "dim", 24)

    def _site(self, site: Part, top: int) -> Iterator[str]:
        left, middle = self.left + _BOX, self.left + _BOX + _WIDE // 2
        start, end = self.x + self.half, self.x + self.half + 9
        label, *about = site.lines
        yield f'<g class="site"><title>{_escaped(site.path)}</title>'
        yield f'<path class="way" d="M{start:g} {top + 12} H{middle} V{top + 22}"/>'
        yield f'<path class="head" d="M{middle - 4} {top + 20} h8 l-4 7z"/>'
        yield f'<rect class="box" x="{left}" y="{top + 27}" width="{_WIDE}" height="46" rx="6"/>'
        yield _text(middle, top + 46, label, "path", _LETTERS)
        yield _text(middle, top + 63, " · ".join(about), "dim", _LETTERS + 3)
        yield f'<path class="way" d="M{middle} {top + 73} V{top + 88} H{end + 7:g}"/>'
        yield f'<path class="head" d="M{end + 8:g} {top + 84} v8 l-8 -4z"/>'
        if self.after:
            wide = 2 * self.half + 18
            yield f'<rect class="on" x="{self.x - 15}" y="{top + 40}" width="30" height="18" rx="4"/>'
            yield _text(self.x, top + 53, "res", "dim")
            yield _text(left - 14, top + 8, "pre", "dim")
            yield _text(left - 14, top + 83, "post", "dim")
            yield f'<rect class="update" x="{self.x - wide / 2:g}" y="{top + 83}" width="{wide:g}" height="10" rx="3"/>'
        else:
            yield f'<circle class="add" cx="{self.x}" cy="{top + 88}" r="8"/>'
            yield f'<path class="way" d="M{self.x - 4} {top + 88} h8 m-4 -4 v8"/>'
        yield "</g>"

    def _on(self, part: Part, top: int) -> Iterator[str]:
        (text,), shape = part.lines, "on" if part.kind == "lifted" else "repeat"
        wide = min(7 * min(len(text), 24) + 18, 2 * _TRUNK - 16)
        yield f'<g class="{part.kind}-part"><title>{_escaped(text)}</title>'
        yield f'<rect class="{shape}" x="{self.x - wide / 2:g}" y="{top + 12}" width="{wide}" height="26" rx="4"/>'
        yield _text(self.x, top + 29, text, "dim", 29)
        yield "</g>"


def _text(x: float, y: float, text: str, kind: str, letters: int = 100) -> str:
    if len(text) > letters:  # keep more of the end, which says more
        text = f"{text[: letters // 3]}…{text[len(text) - (letters - letters // 3 - 1) :]}"
    return f"<text class={quoteattr(kind)} x={quoteattr(f'{x:g}')} y={quoteattr(f'{y:g}')}>{_escaped(text)}</text>"


def _escaped(text: str) -> str:
    """Return XML text, without the characters that XML cannot represent."""
    return escape("".join(letter if letter.isprintable() else " " for letter in text))
