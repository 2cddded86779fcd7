"""Fixtures for all tests."""

import gc
import os

# Threads that spin while they wait for each other make a step many times slower on busy cores. Read
# when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers.time_budget import TimeBudget, add_options

# Kernels for CUDA run in Triton's interpreter, where Triton is installed; read when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fresh_torch():
    """Every test starts with an empty Dynamo, no leftover graphs of another test's models, and one seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _cheap_compiles():
    """Leave out of every compile what costs as much as a small model does, and tests nothing.

    Collections would look at the half million objects of the libraries again and again, and Dynamo
    flushes the caches of the processor to log how long guards take (20 ms each time).
    """
    if gc.get_freeze_count():  # a session in a test of another one
        yield
        return
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(10_000, *thresholds[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0)
        yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def pytest_addoption(parser):
    parser.addoption(
        "--regenerate", action="store_true", help="write the snapshots of the tests instead of comparing with them"
    )
    add_options(parser)


def pytest_configure(config):
    if config.option.seconds is not None:
        config.pluginmanager.register(TimeBudget(config.option))
