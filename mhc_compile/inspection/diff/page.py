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

#: In loading order; all share one scope.
_SCRIPTS = ("model.js", "rows.js", "arcs.js", "panels.js", "page.js")


def render_page(diff: ModelDiff) -> str:
    """Return the text of the HTML file."""
    style = f"\n{_asset('page.css')}"
    script = f"\n(() => {{\n'use strict';\n{''.join(map(_asset, _SCRIPTS))}}})();\n"
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style))
    policy = "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src data:; base-uri 'none'; "
    title = html.escape(f"{diff.model}: {diff.before} → {diff.after}")
    parts = {"policy": policy.format(*digests) + "form-action 'none'", "title": title, "style": style, "script": script}
    # Text inside a script element; `json` escapes all but ASCII.
    content = {
        **diff.to_dict(),
        "defaults": Options().resolved.to_dict(),
        "legend": [
            {"change": change.value, "sign": sign.strip(), "text": text} for change, (sign, _, text) in LOOK.items()
        ],
        "layers": [_layers(graph) for graph in diff.graphs],
    }
    data = json.dumps(content, separators=(",", ":"))
    parts["data"] = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    head, *rest = _asset("page.html").split("{{")
    page = [head]
    for piece in rest:  # one pass: braces in the data are not placeholders
        name, _, text = piece.partition("}}")
        page += [parts[name], text]
    return "".join(page)


def _asset(name: str) -> str:
    return (files("mhc_compile.inspection.diff") / "assets" / name).read_text(encoding="utf-8")


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
