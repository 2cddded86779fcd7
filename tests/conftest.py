"""Fixtures for all tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_torch():
    """Every test starts with an empty Dynamo, no leftover graphs of another test's models, and one seed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
