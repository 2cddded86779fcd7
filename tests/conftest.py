"""Fixtures for all tests."""

import os

# Threads that spin while they wait make a step many times slower on a busy machine. Read when torch
# is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # the kernels for CUDA then run in Triton's interpreter, where Triton is installed; read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fresh_torch():
    """Start every test with an empty Dynamo and one seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def pytest_addoption(parser):
    parser.addoption(
        "--regenerate",
        action="store_true",
        help="write snapshots and the output that guides quote instead of comparing",
    )


@pytest.fixture
def regenerate(request):
    """Whether snapshots and quoted output are to be written instead of compared."""
    return request.config.getoption("regenerate")
