"""The device of `tests/cuda`: CUDA, or with `MHC_TEST_DEVICE=cpu` the CPU, whose C++ kernels check
the tests themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("MHC_TEST_DEVICE", "cuda")


def needs_device() -> pytest.MarkDecorator:
    """The mark of a file of `tests/cuda`, all of which is skipped where its device is missing."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; MHC_TEST_DEVICE=cpu checks the tests themselves", allow_module_level=True)
    return pytest.mark.cuda
