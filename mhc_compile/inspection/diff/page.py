"""Renders a `ModelDiff` as one HTML file that needs no server, no network and nothing else.

The data travels as JSON; `assets/*.js` build the page from it with `textContent` alone, so that no name of a module can become markup, and the
content security policy lets nothing run but those scripts.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from mhc_compile.config.options import Options
from mhc_compile.inspection.diff.fold import common, layers
from mhc_compile.inspection.diff.rows import Change
from mhc_compile.inspection.diff.text import LOOK

if TYPE_CHECKING:
    from mhc_compile.inspection.diff.model_diff import GraphDiff, ModelDiff

__all__ = ["render_page"]

#: In the order in which they are loaded; all share one scope.
_SCRIPTS = ("model.js", "rows.js", "arcs.js", "panels.js", "page.js")


def render_page(diff: ModelDiff) -> str:
    """The page, as the text of an HTML file."""
    style = f"\n{_asset('page.css')}"
    script = f"\n(() => {{\n'use strict';\n{''.join(map(_asset, _SCRIPTS))}}})();\n"
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(f"{diff.model}: {diff.before} → {diff.after}"),
        "style": style,
        "data": _json(_data(diff)),
        "script": script,
    }
    head, *rest = _asset("page.html").split("{{")
    page = [head]
    for piece in rest:  # one pass: what is put in is not looked at again
        name, _, text = piece.partition("}}")
        page += [parts[name], text]
    return "".join(page)


def _asset(name: str) -> str:
    return (files("mhc_compile.inspection.diff") / "assets" / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _json(data: Any) -> str:
    """JSON that stays text inside a script element. `json` writes what is not ASCII as escapes, U+2028 and U+2029 among them."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(diff: ModelDiff) -> dict[str, Any]:
    return {
        **diff.to_dict(),
        "defaults": Options().resolved.to_dict(),
        "legend": [
            {"change": change.value, "sign": sign.strip(), "text": text} for change, (sign, _, text) in LOOK.items()
        ],
        "layers": [_layers(graph) for graph in diff.graphs],
    }


def _layers(graph: GraphDiff) -> list[dict[str, Any]]:
    """The groups of rows that the page shows: inputs and parameters, then layer by layer."""
    kinds: dict[str, str] = {}
    for row in graph.rows:
        kinds.setdefault(row.node.module, row.node.kind)
    places = [place for place, row in enumerate(graph.rows) if row.node.op in {"call", "output"}]
    others = [place for place, row in enumerate(graph.rows) if row.node.op not in {"call", "output"}]
    found = [{"path": "", "kind": "", "like": "", "inputs": True, "rows": others}] if others else []
    rest = iter(places)
    quiet: dict[str, Any] | None = None  # the group before, if nothing changes in it: it takes in the next such
    for layer in layers(graph.rows):
        rows = [next(rest) for _ in layer.rows]
        unchanged = not layer.like and all(row.change is Change.SAME for row in layer.rows)
        if unchanged and quiet is not None:
            path = common([quiet["path"], layer.path])
            quiet.update(path=path, kind=kinds.get(path, ""), rows=quiet["rows"] + rows)
            continue
        found.append(
            {"path": layer.path, "kind": kinds.get(layer.path, ""), "like": layer.like, "inputs": False, "rows": rows}
        )
        quiet = found[-1] if unchanged else None
    return found
