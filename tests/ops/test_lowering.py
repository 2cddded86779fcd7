"""What Inductor makes of a chain: the operators that are called, counted in the code that it generates."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code


class Deep(nn.Module):
    """Blocks between two other layers: with the chain's ends at the graph's edges, streams would be expected to go on elsewhere."""

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(width, width), nn.Linear(width, width)
        self.branches = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth))

    def forward(self, x):
        x = self.before(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.behind(x)


def calls(model, x, **options) -> tuple[Counter[str], str]:
    """Calls of our operators in the generated code of forward and backward."""
    torch.compile(model, backend="mhc", options=options)(x)  # attaches
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mhc", options=options)
    _, sources = run_and_get_code(lambda: compiled(x).square().sum().backward())
    code = "\n".join(sources)
    return Counter(re.findall(r"torch\.ops\.mhc\.(\w+)\.default\(", code)), code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_site_is_one_call_forward_and_one_backward(dtype):
    depth = 4
    counts, _ = calls(Deep(depth).to(dtype), torch.randn(2, 8, 16, dtype=dtype))
    assert counts == {
        "read": 1,
        "read_backward": 1,
        "step": depth - 1,
        "step_backward": depth - 1,
        "close": 1,
        "close_backward": 1,
    }


def test_iterations_do_not_change_the_code():
    codes = []
    for iterations in (1, 20):
        torch.manual_seed(0)
        counts, code = calls(Deep(2), torch.randn(2, 8, 16), iterations=iterations)
        assert counts["step"] == 1
        codes.append(len(code.splitlines()))
    assert codes[0] == codes[1]


@pytest.mark.slow
def test_apart_without_kernels():
    counts, _ = calls(Deep(2), torch.randn(2, 8, 16), recompute="none")
    assert not counts["step"]
    assert counts["sinkhorn"] == 2
