"""What Inductor makes of a chain: the operators that are called, counted in the code that it
generates.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import mhc_compile


class Deep(nn.Module):
    """Blocks between two other layers: with the chain's ends at the graph's edges, streams would be
    expected to go on elsewhere.
    """

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(width, width), nn.Linear(width, width)
        self.branches = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth))

    def forward(self, x):
        x = self.before(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.behind(x)


DEPTH = 3


@functools.cache
def calls(dtype: torch.dtype = torch.float32, **options: int) -> tuple[Counter[str], str]:
    """Return how often the generated code calls each operator, and the code of forward and
    backward. A lazy operator counts as the one whose work it does.
    """
    torch.manual_seed(0)
    model, x = Deep(DEPTH).to(dtype), torch.randn(2, 8, 16, dtype=dtype)
    mhc_compile.attach(model, x, options=options)
    compiled = torch.compile(model, backend="mhc", options=options)
    _, sources = run_and_get_code(lambda: compiled(x).square().sum().backward())
    code = "\n".join(sources)
    return Counter(re.findall(r"torch\.ops\.mhc\.(?:lazy_)?(\w+)\.default\(", code)), code


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_site_is_one_call_forward_and_one_backward(dtype):
    counts, _ = calls(dtype)
    assert counts == {
        "read": 1,
        "read_backward": 1,
        "step": DEPTH - 1,
        "step_backward": DEPTH - 1,
        "close": 1,
        "close_backward": 1,
    }


def test_iterations_do_not_change_the_code():
    (counts, default), (_, short) = calls(torch.float32), calls(torch.float32, iterations=1)
    assert counts["step"] == DEPTH - 1
    assert len(default.splitlines()) == len(short.splitlines())
