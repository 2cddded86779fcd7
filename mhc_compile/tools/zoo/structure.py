"""The site tree of a family, as data and as text without node names, source lines or timings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.capture.shared_graphs import Sharing, below
from mhc_compile.capture.trace import capture
from mhc_compile.compilation.session import analyze_graph
from mhc_compile.config.options import Options

if TYPE_CHECKING:
    import torch

    from mhc_compile.graph_breaks.split_branches import Notes
    from mhc_compile.passes import Site
    from mhc_compile.tools.zoo.family import Family, Mode


@dataclass(frozen=True)
class Structure:
    """The sites and rejections that the finder reports for a family.

    Attributes:
        graphs: number of graphs that Dynamo captured.
        chains: for every chain its sites, each as one line: path, width, axis, number of adds.
        rejected: module and reason of every other addition, in the order of the graph.
        layers: the depth.
        mode: "train" or "eval".
    """

    graphs: int
    chains: tuple[tuple[str, ...], ...]
    rejected: tuple[tuple[str, str], ...]
    layers: int
    mode: Mode

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the chains, longest first."""
        return tuple(sorted(map(len, self.chains), reverse=True))

    @property
    def reasons(self) -> Counter[str]:
        """Number of rejections by reason."""
        return Counter(reason for _, reason in self.rejected)

    def __str__(self) -> str:
        sites, skipped = sum(self.lengths), len(self.rejected)
        lines = [f"{self.layers} layers, {self.mode}: {sites} sites, {skipped} additions skipped, {self.graphs} graphs"]
        for number, chain in enumerate(self.chains, start=1):
            lines += ["", f"chain {number}", *(f"  {site}" for site in chain)]
        if self.rejected:
            lines += ["", "skipped"]
            lines += [
                f"  {module or '(the model itself)'}  {reason}" + (f"  × {count}" if count > 1 else "")
                for (module, reason), count in Counter(self.rejected).items()
            ]
        return "\n".join(lines) + "\n"


def structure(family: Family, layers: int = 2, mode: Mode = "train", options: Options | None = None) -> Structure:
    """Trace the family and analyze its graphs. Runs nothing.

    Raises:
        CaptureError: the model could not be traced.
    """
    chosen = Options.parse(options)
    model, args, kwargs = family.build(layers)
    chains: list[tuple[str, ...]] = []
    rejected: list[tuple[str, str]] = []
    sharing = Sharing(model)

    def on_graph(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Notes:
        result = analyze_graph(graph_module, inputs, chosen)
        plan = result.plan
        for module in sharing.modules(result.provenance.root, result.provenance.frame):
            chains.extend(tuple(_line(site, module) for site in chain.sites) for chain in plan.chains)
            rejected.extend(
                (below(module, rejection.module_path), rejection.reason.value) for rejection in plan.rejections
            )
        return result.annotations()

    graphs = capture(model.train(mode == "train"), args, kwargs, on_graph)
    return Structure(graphs, tuple(chains), tuple(rejected), layers, mode)


def _line(site: Site, module: str) -> str:
    adds = f"  {len(site.adds)} adds" if len(site.adds) > 1 else ""
    return f"{below(module, site.path)}  C={site.width} axis={site.axis}{adds}"
