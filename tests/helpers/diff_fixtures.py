"""Diffs that several test files draw: of real models, and one by hand whose names try to be
markup.
"""

from __future__ import annotations

from functools import cache

import torch
from helpers.builders import Decoder, Pair, Small, points, tokens
from torch import nn

import mhc_compile
from mhc_compile.config.options import Options
from mhc_compile.inspection.diff.compare import align
from mhc_compile.inspection.diff.results import GraphDiff, ModelDiff, NodeView
from mhc_compile.inspection.explain.results import ChainReport, RejectionReport, SiteReport

SCRIPT = "</script><script>window.hacked = true</script>"
IMAGE = "<img src=x onerror=window.hacked=true>"
COMMENT = "<!--<script>\u2028{{data}}"


@cache
def decoder(layers: int = 2) -> ModelDiff:
    return mhc_compile.diff(Decoder(layers=layers).eval(), tokens())


class Nested(nn.Module):
    """Two sites whose branches have residual adds of their own: the first is a chain of two, the
    second has none.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.Linear(width, 4), Pair(4), nn.Linear(4, width))
        self.flat = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.deep(x)
        return x + self.flat(x)


@cache
def nested() -> ModelDiff:
    return mhc_compile.diff(nn.Sequential(nn.Linear(3, 8), Nested()).eval(), points())


@cache
def activated() -> ModelDiff:
    """A ReLU between two sites, which runs on all streams."""
    from mhc_compile.tools import zoo

    model, args, kwargs = zoo.get("resnet").build(2)
    return mhc_compile.diff(model.eval(), *args, **kwargs)


@cache
def unchanged() -> ModelDiff:
    """Nothing to rewrite, and nothing that was looked at."""
    return mhc_compile.diff(nn.Linear(3, 2), points())


def graphless() -> ModelDiff:
    """Of a model that Dynamo makes no graph of."""
    return ModelDiff("Empty", Options().resolved, "capture", "expand", ())


@cache
def alone() -> ModelDiff:
    """An addition that is left alone."""
    return mhc_compile.diff(Small().eval(), points(), options={"min_chain_length": 3})


def node(name: str, target: str = "", *reads: str, **fields: str) -> NodeView:
    known = {"module": "", "kind": "", "source": "", "role": "", "site": "", "reason": "", "value": "float32[2, 8]"}
    op = "call" if target else "input"
    return NodeView(name, op, target, ", ".join("{}" for _ in reads), reads, **{**known, **fields})


@cache
def hostile() -> ModelDiff:
    """Two sites in modules whose paths, classes, files and reasons are markup.

    A module's name may be anything without dots.
    """
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
        node(COMMENT, "add", "add_1", "x", role="skipped", reason="broadcast", **places[1]),
    ]
    after = [
        node("x"),
        node("mhc_streams", ".expand", "x", role="stream", value="float32[2, 4, 8]"),
        node("f", f"F.{IMAGE}", "x", **places[0]),
        node("mhc_streams_1", "mhc.update", "mhc_streams", "f", role="stream", site=first, **places[0]),
        node("g", "F.relu", "mhc_streams_1", **places[1]),
        node("mhc_streams_2", "mhc.update", "mhc_streams_1", "g", role="stream", site=second, **places[1]),
        node("mhc_read_out", "torch.mean", "mhc_streams_2", role="stream", **places[1]),
        node(COMMENT, "add", "mhc_read_out", "x", role="skipped", reason="broadcast", **places[1]),
    ]
    sites = tuple(
        SiteReport(site, path, f"{IMAGE}Block", "f", index, 8, 1, f"/tmp/{SCRIPT}/model.py:{index}")
        for index, (path, site) in enumerate(zip(paths, (first, second), strict=True))
    )
    chain = ChainReport(sites, 8, (), False, False)
    rejection = RejectionReport(COMMENT, paths[1], "broadcast", f"the terms {SCRIPT} & {IMAGE}", "model.py:3")
    graph = GraphDiff(("",), align(before, after), (chain,), (rejection,))
    return ModelDiff(f"{SCRIPT}{IMAGE}", Options().resolved, "capture", "expand", (graph,))


@cache
def pieces() -> ModelDiff:
    """Two graphs, as a graph break leaves them."""
    return ModelDiff("Pieces", Options().resolved, "capture", "expand", (decoder().graphs[0], hostile().graphs[0]))
