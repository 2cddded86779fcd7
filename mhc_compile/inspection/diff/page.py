"""A `ModelDiff` as one HTML file that needs no server and no network.

The data is embedded as JSON. `assets/*.js` build the page from it with `textContent` alone, so that
no name in a model can become markup; the content security policy permits only those scripts.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from mhc_compile.config.options import Options
from mhc_compile.inspection.diff.fold import layers
from mhc_compile.inspection.diff.text import LOOK

if TYPE_CHECKING:
    from mhc_compile.inspection.diff.results import GraphDiff, ModelDiff

__all__ = ["render_page"]

#: In loading order; all share one scope.
_SCRIPTS = ("model.js", "rows.js", "arcs.js", "panels.js", "page.js")


def render_page(diff: ModelDiff) -> str:
    """Return the text of the HTML file."""
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
    for piece in rest:  # one pass: braces in the data are not placeholders
        name, _, text = piece.partition("}}")
        page += [parts[name], text]
    return "".join(page)


def _asset(name: str) -> str:
    return (files("mhc_compile.inspection.diff") / "assets" / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _json(data: Any) -> str:
    """Return JSON that stays text inside a script element; `json` escapes all but ASCII."""
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
    """Return the groups of rows of the page: inputs and parameters, then layer by layer."""
    kinds: dict[str, str] = {}
    places: dict[bool, list[int]] = {True: [], False: []}
    for place, row in enumerate(graph.rows):
        kinds.setdefault(row.node.module, row.node.kind)
        places[row.node.op in {"call", "output"}].append(place)
    found = [{"path": "", "kind": "", "like": "", "inputs": True, "rows": places[False]}] if places[False] else []
    rest = iter(places[True])
    for layer in layers(graph.rows):
        rows, kind = [next(rest) for _ in layer.rows], kinds.get(layer.path, "")
        found.append({"path": layer.path, "kind": kind, "like": layer.like, "inputs": False, "rows": rows})
    return found
