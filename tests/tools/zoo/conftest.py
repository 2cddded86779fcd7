"""Parameters over families for the tests of the zoo, and structures that are traced once."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from dataclasses import dataclass

import pytest

from mhc_compile import Options
from mhc_compile.capture.shared_graphs import below
from mhc_compile.inspection.explain.explain import plan_graphs
from mhc_compile.tools import zoo

#: The families of the default run, one for each way of carrying streams. The others are slow tests.
DEFAULT = frozenset(
    "pre-norm post-norm pre-norm-dropout parallel cast-skip resnet nested checkpointed trap-cubic-gelu"
    " trap-straight-through trap-many-streams trap-side-add gpt2 llama t5".split()
)


@dataclass(frozen=True)
class Structure:
    """The site tree that `explain` finds, as data and as text without node names, source lines or
    timings.
    """

    graphs: int
    chains: tuple[tuple[str, ...], ...]  # for every site its path, width, axis, number of adds
    rejected: tuple[tuple[str, str], ...]  # module and reason of every other addition
    layers: int
    mode: str

    @property
    def lengths(self):
        return tuple(sorted(map(len, self.chains), reverse=True))

    @property
    def reasons(self):
        return Counter(reason for _, reason in self.rejected)

    def __str__(self):
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


def structure(family, layers, mode):
    model, args, kwargs = family.build(layers)
    graphs, chains, rejected = [], [], []

    def line(site, module):
        adds = f"  {len(site.adds)} adds" if len(site.adds) > 1 else ""
        return f"{below(module, site.path)}  C={site.width} axis={site.axis}{adds}"

    def on_graph(captured, graph, plan, provenance, modules):
        graphs.append(graph)
        for module in modules:
            chains.extend(tuple(line(site, module) for site in chain.sites) for chain in plan.chains)
            rejected.extend((below(module, one.module_path), one.reason.value) for one in plan.rejections)

    plan_graphs(model.train(mode == "train"), args, kwargs, Options().resolved, on_graph)
    return Structure(len(graphs), tuple(chains), tuple(rejected), layers, mode)


def parameters(*, runs, needs=None):
    """Yield `(family, layers, mode)` with readable ids.

    `runs` maps depth and mode to whether the default run has the families of `DEFAULT`; `needs`
    restricts these to families of one package.
    """
    for family in zoo.list_families():
        default = family.name in DEFAULT and needs in {None, family.needs}
        for (layers, mode), fast in runs.items():
            marks = () if fast and default else (pytest.mark.slow,)
            yield pytest.param(family, layers, mode, id=f"{family.name}-{mode}-{layers}", marks=marks)


def pytest_generate_tests(metafunc):
    wanted = metafunc.definition.get_closest_marker("zoo")
    if wanted is not None:
        metafunc.parametrize(("family", "layers", "mode"), list(parameters(**wanted.kwargs)))


@pytest.fixture(autouse=True)
def _quiet():
    """Silence deprecations of libraries, and Dynamo's messages about intended graph breaks."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for module in (r"torch\.", r"transformers\."):
            warnings.filterwarnings("ignore", module=module)
        yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def traced():
    """Return `traced(family, layers, mode)`: the structure, traced once per session."""
    known = {}

    def look(family, layers, mode):
        key = (family.name, layers, mode)
        if key not in known:
            known[key] = structure(family, layers, mode)
        return known[key]

    return look
