"""Fixtures of the tests for a GPU, and the errors that they found."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
from helpers.gpu import DEVICE

# Read when CUDA's libraries are loaded; without it, deterministic algorithms refuse products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture
def cuda(device) -> str:
    """The device of tests that have no meaning on CPU."""
    if device != "cuda":
        pytest.skip("needs CUDA")
    return device


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Show the worst errors that tests recorded as ("error", (what, number)); workers send them."""
    worst: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == "error":
                    worst[value[0]] = max(worst[value[0]], value[1])
    if worst:
        terminalreporter.section("worst relative errors against float64")
        for what, number in sorted(worst.items()):
            terminalreporter.write_line(f"{what:48} {number:.1e}")
