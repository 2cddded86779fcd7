"""The device of `tests/cuda`: CUDA, or by `MHC_TEST_DEVICE` the CPU: "cpu" for its C++ kernels,
which check the tests themselves, "interpreter" for the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import pytest
import torch

from mhc_compile.ops.library import LIBRARY

CHOSEN = os.environ.get("MHC_TEST_DEVICE", "cuda")
DEVICE = "cuda" if CHOSEN == "cuda" else "cpu"


def needs_device() -> pytest.MarkDecorator:
    """The mark of a file of `tests/cuda`, all of which is skipped where its device is missing."""
    if CHOSEN == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; MHC_TEST_DEVICE=cpu checks the tests themselves", allow_module_level=True)
    if CHOSEN == "interpreter":
        if importlib.util.find_spec("triton") is None:
            pytest.skip('the interpreter needs Triton (pip install "mhc-compile[gpu]")', allow_module_level=True)
        interpret()
    return pytest.mark.cuda


@functools.cache
def interpret() -> None:
    """Let the operators `mhc::` run the Triton kernels on CPU tensors, in this process."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    from mhc_compile.ops import triton

    for name in ("read", "step", "shifted_step", "mix_read", "update", "close", "lazy_step"):
        for end in ("", "_backward"):
            LIBRARY.impl(f"{name}{end}", getattr(triton, f"{name}{end}"), "CPU", allow_override=True)
