"""Fixtures for all tests."""

import os

# Threads that spin while they wait make a step many times slower on a busy machine. Read when torch
# is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers.cheap_compiles import make_compiles_cheap
from helpers.time_budget import TimeBudget, add_options

# Kernels for CUDA run in Triton's interpreter, where Triton is installed; read when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fresh_torch():
    """Start every test with an empty Dynamo and one seed, and end it with gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    assert (2 * torch.ones(1, requires_grad=True)).requires_grad, "this test leaves gradients disabled"


@pytest.fixture(autouse=True, scope="session")
def _cheap_compiles():
    make_compiles_cheap()


def pytest_addoption(parser):
    parser.addoption(
        "--regenerate",
        action="store_true",
        help="write snapshots and the output that guides quote instead of comparing",
    )
    add_options(parser)


def pytest_configure(config):
    if config.option.seconds is not None:
        config.pluginmanager.register(TimeBudget(config.option))


@pytest.fixture
def regenerate(request):
    """Whether snapshots and quoted output are to be written instead of compared."""
    return request.config.getoption("regenerate")
