"""Parameters over families for the tests of the zoo, and structures that are traced once."""

from __future__ import annotations

import logging
import warnings

import pytest

from mhc_compile.tools import zoo
from mhc_compile.tools.zoo.structure import structure

#: The families of the default run, one for each way of carrying streams. The others are slow tests.
DEFAULT = frozenset(
    "pre-norm post-norm pre-norm-dropout parallel cast-skip resnet nested checkpointed trap-cubic-gelu"
    " trap-straight-through trap-many-streams trap-side-add gpt2 llama t5".split()
)


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
