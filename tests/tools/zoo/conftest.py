"""What the tests of the zoo share: which families run by default, and structures that are traced once."""

from __future__ import annotations

import logging
import warnings

import pytest

from mhc_compile.tools import zoo
from mhc_compile.tools.zoo.structure import structure

#: One or two transformers models for each structure. The others are slow tests.
REPRESENTATIVE = frozenset(
    "gpt2 llama gptj opt-post albert t5 vit swin convnextv2 clip mixtral wav2vec2-conformer".split()
)


#: One family for each way in which streams are carried.
CARRIED = frozenset(
    "pre-norm-dropout post-norm deepnorm stochastic-depth dropped-trunk dit cait global-context resnet regnet padded-resnet rrdb conformer"
    " decomposed shared-layer hidden-states reversible add-statement augmented-trunk written-input addcmul cast-skip break-in-middle checkpointed"
    " frozen-half autograd-function trap-many-streams".split()
)


def is_fast(family) -> bool:
    return family.needs == "torch" or family.name in REPRESENTATIVE


def is_handwritten(family) -> bool:
    return family.needs == "torch"


def is_carried(family) -> bool:
    return family.name in CARRIED


def never(family) -> bool:
    return False


#: Which families a test runs over by default, by the name that the `zoo` mark uses.
FAST = {"representative": is_fast, "handwritten": is_handwritten, "none": never, "carried": is_carried}


def parameters(*, layers_and_modes, groups=None, without=()):
    """`(family, layers, mode)` with readable ids. `layers_and_modes` maps depth and mode to which families the default run has."""
    for family in zoo.families():
        if family.group in without or (groups is not None and family.group not in groups):
            continue
        for (layers, mode), fast in layers_and_modes.items():
            marks = () if FAST[fast](family) else (pytest.mark.slow,)
            yield pytest.param(family, layers, mode, id=f"{family.name}-{mode}-{layers}", marks=marks)


def pytest_generate_tests(metafunc):
    wanted = metafunc.definition.get_closest_marker("zoo")
    if wanted is not None:
        metafunc.parametrize(("family", "layers", "mode"), list(parameters(**wanted.kwargs)))


@pytest.fixture(autouse=True)
def _quiet():
    """Libraries warn about their own future, and Dynamo tells of graph breaks that the families are made for."""
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
    """`traced(family, layers, mode)`: the structure, traced once per session."""
    known = {}

    def look(family, layers, mode):
        key = (family.name, layers, mode)
        if key not in known:
            known[key] = structure(family, layers, mode)
        return known[key]

    return look
