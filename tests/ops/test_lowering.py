"""What Inductor makes of a chain: the operators that are called, counted in the code that it
generates.
"""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest
import torch
from helpers.builders import Deep
from helpers.gates import scatter
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import mhc_compile
from mhc_compile import _torch
from mhc_compile.ops.cpu.kernels import function

DEPTH = 3


@functools.cache
def calls(dtype: torch.dtype = torch.float32, **options: int | str) -> tuple[Counter[str], str]:
    """Return how often the generated code calls each kernel or, with `op:`, operator, and the code
    of forward and backward. A lazy kernel counts as the one whose work it does.
    """
    torch.manual_seed(0)
    model, x = Deep(DEPTH).to(dtype), torch.randn(2, 8, 16, dtype=dtype)
    mhc_compile.attach(model, x, options=options)
    compiled = torch.compile(model, backend="mhc", options=options)
    _, sources = run_and_get_code(lambda: compiled(x).square().sum().backward())
    code = "\n".join(sources)
    kernels = re.findall(r"= mhc_(?:lazy_)?(\w+)_[0-9a-f]{8}\((?=buf|arg|primals|reinterpret|tangents|None)", code)
    operators = re.findall(r"torch\.ops\.mhc\.(\w+)\.default\(", code)
    return Counter([*kernels, *(f"op:{name}" for name in operators)]), code


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_site_is_one_call_forward_and_one_backward(dtype):
    counts, code = calls(dtype)
    assert counts == {
        "read": 1,
        "read_backward": 1,
        "step": DEPTH - 1,
        "step_backward": DEPTH - 1,
        "close": 1,
        "close_backward": 1,
    }
    assert len(re.findall(r"= mhc_lazy_step_[0-9a-f]{8}\(", code)) == DEPTH - 1, "streams are written"
    assert "torch.ops.mhc" not in code, "a dispatcher is between Inductor's code and a kernel"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"preset": "deepseek-v4.1"}, {"shifted_step": DEPTH - 1, "mix_read": 1, "op:sinkhorn": 1}),
        ({"token_dependent": False}, {"mix_read": DEPTH - 1, "close": 1, "op:sinkhorn": DEPTH}),
        ({"token_dependent": False, "mapping": "kronecker"}, {"mix_read": DEPTH - 1, "close": 1}),
    ],
)
def test_weights_that_are_known_before_make_one_call_a_site(options, wanted, dtype):
    """But for the coefficients of a first site in a single pass, and static ones."""
    counts, _ = calls(dtype, **options)
    assert counts == {name: count for one, count in wanted.items() for name in (one, f"{one}_backward")}


def test_calls_with_any_number_of_tokens():
    """In one graph, from fewer tokens than phi is packed for to more."""
    model = Deep(DEPTH).double()
    mhc_compile.attach(model, torch.randn(2, 8, 16, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    compiled, graphs = torch.compile(model, backend="mhc", dynamic=True), set()
    eager = mhc_compile.eager(model)
    for tokens in (8, 3, 50):
        x = torch.randn(2, tokens, 16, dtype=torch.float64)
        found = []
        for call in (eager, compiled):
            model.zero_grad()
            counters.clear()
            (y := call(x)).square().sum().backward()
            found.append([y, *(parameter.grad for parameter in model.parameters())])
        graphs.add((tokens, counters["stats"]["unique_graphs"]))
        torch.testing.assert_close(*found)
    assert graphs == {(8, 1), (3, 0), (50, 0)}


def test_a_kernel_rejects_what_is_no_tensor():
    kernel = function("close", torch.float32, torch.float32, 4, None, False)
    with pytest.raises(TypeError, match="tensor"):
        kernel("streams")
    with pytest.raises(TypeError, match="too many"):
        kernel(*range(200))
    with pytest.raises(OverflowError):
        kernel(2**70)


def test_iterations_do_not_change_the_code():
    (counts, default), (_, short) = calls(torch.float32), calls(torch.float32, iterations=1)
    assert counts["step"] == DEPTH - 1
    assert len(default.splitlines()) == len(short.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["cheap", "block"])
@pytest.mark.parametrize("options", [{"preset": "deepseek-v4.1"}, {"token_dependent": False}])
def test_graphs_for_inductor_compute_what_the_operators_one_by_one_do(monkeypatch, options, recompute):
    """Every site but the first is one operator, and loss and gradients are those of eager mode."""
    graphs, compile_with_inductor = [], _torch.compile_with_inductor
    monkeypatch.setattr(
        _torch,
        "compile_with_inductor",
        lambda graph, *rest: (graphs.append(graph), compile_with_inductor(graph, *rest))[1],
    )
    torch.manual_seed(0)
    model, x = Deep(5).double(), torch.randn(2, 8, 16, dtype=torch.float64)
    mhc_compile.attach(model, x, options=options)
    scatter(model, 0.5)
    results = []
    for settings in ({"inner_backend": "eager"}, {"recompute": recompute}):
        torch._dynamo.reset()
        loss = torch.compile(model, backend="mhc", options={**options, **settings, "strict": True})(x).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    (graph,) = graphs
    counts = Counter(str(node.target) for node in graph.graph.nodes)
    fused = ("mhc.shifted_step.default", "mhc.mix_read.default", "mhc.close.default")
    assert sum(counts[name] for name in fused) == 5  # the end of every site
    assert not counts["mhc.update.default"]
    for one, other in zip(*results, strict=True):
        assert not one.numel() or (one - other).abs().max() <= 1e-11 * (1 + other.abs().max())
