"""Diffs that several test files draw: of real models, and one by hand whose names try to be markup."""

from __future__ import annotations

from functools import cache

from builders import Decoder, tokens

import mhc_compile
from mhc_compile.diffing.model_diff import GraphDiff, ModelDiff
from mhc_compile.diffing.rows import align
from mhc_compile.diffing.views import NodeView
from mhc_compile.explanation import ChainReport, RefusalReport, SiteReport
from mhc_compile.options import Options

SCRIPT = "</script><script>window.hacked = true</script>"
IMAGE = "<img src=x onerror=window.hacked=true>"
COMMENT = "<!--<script>\u2028{{data}}"


@cache
def decoder(layers: int = 2) -> ModelDiff:
    return mhc_compile.diff(Decoder(layers=layers).eval(), tokens())


def node(name: str, target: str = "", *reads: str, **fields: str) -> NodeView:
    known = {"module": "", "kind": "", "source": "", "role": "", "site": "", "reason": "", "value": "float32[2, 8]"}
    op = "call" if target else "input"
    return NodeView(name, op, target, ", ".join("{}" for _ in reads), reads, **{**known, **fields})


@cache
def hostile() -> ModelDiff:
    """Two sites in modules whose paths, classes, files and reasons are markup. A module's name may be anything without dots."""
    paths = (f"{SCRIPT}", f"{IMAGE}")
    first, second = (f"{path}.mhc.f" for path in paths)
    places = [
        {"module": path, "kind": f"{IMAGE}Block", "source": f"/tmp/{SCRIPT}/model.py:{line}"}
        for line, path in enumerate(paths)
    ]
    before = [
        node("x"),
        node("f", f"F.{IMAGE}", "x", **places[0]),
        node("add", "add", "f", "x", role="site", site=first, **places[0]),
        node("g", "F.relu", "add", **places[1]),
        node("add_1", "add", "g", "add", role="site", site=second, **places[1]),
        node(COMMENT, "add", "add_1", "x", role="left-alone", reason="broadcast", **places[1]),
    ]
    after = [
        node("x"),
        node("mhc_streams", ".expand", "x", role="stream", value="float32[2, 4, 8]"),
        node("f", f"F.{IMAGE}", "x", **places[0]),
        node("mhc_streams_1", "mhc.update", "mhc_streams", "f", role="stream", site=first, **places[0]),
        node("g", "F.relu", "mhc_streams_1", **places[1]),
        node("mhc_streams_2", "mhc.update", "mhc_streams_1", "g", role="stream", site=second, **places[1]),
        node("mhc_read_out", "torch.mean", "mhc_streams_2", role="stream", **places[1]),
        node(COMMENT, "add", "mhc_read_out", "x", role="left-alone", reason="broadcast", **places[1]),
    ]
    sites = tuple(
        SiteReport(site, path, f"{IMAGE}Block", "f", index, 8, 1, f"/tmp/{SCRIPT}/model.py:{index}")
        for index, (path, site) in enumerate(zip(paths, (first, second), strict=True))
    )
    chain = ChainReport(sites, 8, (), False, False)
    refusal = RefusalReport(COMMENT, paths[1], "broadcast", f"the terms {SCRIPT} & {IMAGE}", "model.py:3")
    graph = GraphDiff(("",), align(before, after), (chain,), (refusal,))
    return ModelDiff(f"{SCRIPT}{IMAGE}", Options(), "capture", "expand", (graph,))


@cache
def pieces() -> ModelDiff:
    """Two graphs, as a graph break leaves them."""
    return ModelDiff("Pieces", Options(), "capture", "expand", (decoder().graphs[0], hostile().graphs[0]))
