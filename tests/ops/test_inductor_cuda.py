"""What Inductor generates for CUDA round the operators, without a GPU: its own kernels and their
bytes, calls and products, against a table (`--regenerate` writes it).

Its kernels are compiled for sm_90.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "0":
    pytest.skip("needs Triton, and TRITON_INTERPRET=0", allow_module_level=True)
if torch.version.cuda is not None:
    pytest.skip("replaces parts of torch that a build with CUDA has", allow_module_level=True)

import triton
from helpers.fake_cuda import generate, shared_memory
from helpers.sm90 import LARGEST
from helpers.tables import compare_rows

import mhc_compile

TABLE = Path(__file__).parent / "inductor_cuda.md"
#: The versions of the table.
VERSIONS = "2.13.0", "3.9.0"
C, TOKENS, SITES = 1024, (2, 1024), 4
BF16, FP32 = torch.bfloat16, torch.float32
GATED = {"preset": "qwen4-exp", "init": "random"}


@dataclass(frozen=True)
class Case:
    """A model, and the options of hyper-connections; without options it is plain.

    Attributes:
        options: of this package.
        norm: of a branch's input; a gated read has its own.
        after: what is done to a branch's output before it is added.
        autocast: whether parameters and streams are float32, and branches bfloat16.
    """

    options: dict | None
    norm: str = "rms"
    after: str = ""
    autocast: bool = False


CASES = {
    "plain, layer": Case(None, "layer"),
    "paper, layer": Case({}, "layer"),
    "plain, rms": Case(None),
    "paper, rms": Case({}),
    "plain, rms, dropout": Case(None, after="dropout"),
    "paper, rms, dropout": Case({}, after="dropout"),
    "plain, rms, scale": Case(None, after="scale"),
    "paper, rms, scale": Case({}, after="scale"),
    "plain, rms, autocast": Case(None, autocast=True),
    "paper, rms, autocast": Case({}, autocast=True),
    "deepseek-v4, rms": Case({"preset": "deepseek-v4"}),
    "single pass, rms": Case({"preset": "deepseek-v4.1"}),
    "qwen4-exp": Case(GATED, ""),
}
#: The operators that the generated code calls, forward and backward, by the first word of a case.
#: What has no kernel of this package is composed of other operations.
CALLS = {
    "plain": ("", ""),
    "paper": ("read lazy_step lazy_step lazy_step close", "close lazy_step lazy_step step read"),
    "deepseek-v4": ("read lazy_step lazy_step lazy_step", "update lazy_step lazy_step step read"),
    "single pass": (
        "sinkhorn shifted_step shifted_step shifted_step mix_read",
        "mix_read shifted_step shifted_step shifted_step sinkhorn",
    ),
    "qwen4-exp": ("", "update update update update"),
}
#: Operators that copy an input which is not contiguous: here n equal streams, of which one is held.
STRIDED = {("qwen4-exp", "backward"): ["update_backward"]}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        # What `scaled_dot_product_attention` calls on CUDA; a torch without it chooses another.
        mixed = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Blocks between products. Branches have two kernels of Inductor, or one: gelu, and its
    backward; and the gradients of q, k and v become one tensor.
    """

    def __init__(self, case: Case):
        super().__init__()
        norm = {"layer": nn.LayerNorm, "rms": functools.partial(nn.RMSNorm, eps=1e-6), "": nn.Identity}[case.norm]
        self.case = case
        self.embed, self.head = nn.Linear(64, C, bias=False), nn.Linear(C, 64, bias=False)
        self.branches = nn.ModuleList([Attention(), Mlp(), Attention(), Mlp()])
        self.norms = nn.ModuleList(norm(C) for _ in range(SITES))
        self.scales = nn.ParameterList(torch.ones(C) for _ in range(SITES if case.after == "scale" else 0))

    def forward(self, x):
        x = self.embed(x).to(self.embed.weight.dtype)
        for i, (branch, norm) in enumerate(zip(self.branches, self.norms, strict=True)):
            y = branch(norm(x))
            if self.case.after == "dropout":
                y = F.dropout(y, 0.1)
            if self.case.after == "scale":
                y = y * self.scales[i]
            x = x + y
        return self.head(x)


@functools.cache
def generated(name: str):
    """Forward and backward."""
    case = CASES[name]
    model = Net(case).to(FP32 if case.autocast else BF16)
    x = torch.empty(*TOKENS, 64, dtype=model.embed.weight.dtype)
    if case.options is not None:
        mhc_compile.attach(model, x, options=case.options)
    how = {"backend": "inductor"} if case.options is None else {"backend": "mhc", "options": case.options}
    return generate(model, x, autocast=BF16 if case.autocast else None, **how)


def units(name: str, moved: int) -> float:
    """Bytes in those of a tensor [T, C] of the streams' dtype."""
    return moved / (TOKENS[0] * TOKENS[1] * C * (4 if CASES[name].autocast else 2))


@pytest.mark.parametrize("name", CASES)
def test_what_inductor_makes_of_a_model(name, regenerate):
    rows = []
    wanted = CALLS[name.split(",")[0]]
    for graph, direction, calls in zip(generated(name), ("forward", "backward"), wanted, strict=True):
        end = "_backward" if direction == "backward" else ""
        assert graph.calls == [f"{call}{end}" for call in calls.split()]
        assert graph.strided == STRIDED.get((name, direction), [])
        assert set(graph.launches) == graph.sources.keys()
        for kernel, source in graph.sources.items():
            assert shared_memory(kernel, source) <= LARGEST, kernel
        wide = sum(dtype == FP32 for dtype in graph.products)
        products = f"{len(graph.products)} | {wide}"
        operators = ", ".join(f"{count} {call}" for call, count in Counter(graph.calls).items())
        numbers = f"{len(graph.launches)} | {units(name, graph.moved):.1f} | {products}"
        rows.append(f"| {name} | {direction} | {numbers} | {operators} |\n")
    same = (torch.__version__.split("+")[0], triton.__version__) == VERSIONS
    compare_rows(TABLE, name, rows, regenerate=regenerate, same_versions=same)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_adds_and_norms_leave_no_kernel(norm):
    """Not even copies: kernels are those of branches, and the sum of two gradients at the start."""
    found = [
        [name for name in graph.launches if "gelu" not in name and "cat" not in name]
        for graph in generated(f"paper, {norm}")
    ]
    assert [len(names) for names in found] == [0, 1]
    assert "add" in found[1][0]
    for graph, plain, least in zip(generated(f"paper, {norm}"), generated(f"plain, {norm}"), (17, 21), strict=True):
        assert units(f"paper, {norm}", plain.moved - graph.moved) >= least


@pytest.mark.parametrize(
    ("after", "costs"),
    [
        # The mask is half a tensor.
        ("dropout", ((1, 2.51), (1, 2.51))),
        # In the backward the gradient of the scale takes two kernels, and reads both factors again.
        ("scale", ((1, 2.01), (3, 4.1))),
    ],
)
def test_what_stands_between_a_branch_and_the_operator_costs(after, costs):
    """A site's kernels and bytes more than without it, forward and backward."""
    without, found = generated("paper, rms"), generated(f"paper, rms, {after}")
    for before, graph, (kernels, most) in zip(without, found, costs, strict=True):
        assert len(graph.launches) - len(before.launches) == SITES * kernels
        assert units("paper, rms", graph.moved - before.moved) <= SITES * most
