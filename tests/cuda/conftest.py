"""Tests for a GPU. `MHC_TEST_DEVICE=cpu` runs what does not need one on CPU, through the C++
kernels: a check of the tests themselves.
"""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
import torch

# Read when CUDA's libraries are loaded; without it, deterministic algorithms refuse products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device() -> str:
    chosen = os.environ.get("MHC_TEST_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; MHC_TEST_DEVICE=cpu checks the tests themselves")
    return chosen


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
