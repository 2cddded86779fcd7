"""FuseNorms: which norms it fuses, which stay, the numbers, and what a compiled model saves."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.gates import scatter
from helpers.graphs import C, Model
from torch import fx, nn

import mhc_compile
from mhc_compile._torch.benchmarking import caches, observe_graphs
from mhc_compile.passes import run_passes
from mhc_compile.passes.analysis.op_info import op_name
from mhc_compile.passes.transforms.fuse_norms import FuseNorms
from mhc_compile.passes.transforms.fuse_sites import FuseSites

SINGLE_PASS, STATIC = {"preset": "deepseek-v4.1"}, {"token_dependent": False}


def llama(m, x):
    wide = x.to(torch.float64)
    factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.vector * (wide * factor).to(torch.float64)


def gemma(m, x):
    wide = x.double()
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (out * (1.0 + m.vector.double())).type_as(x)


#: What is fused, with its kind and whether it has a gain and a shift.
FUSED = {
    "layer_norm": (lambda m, x: F.layer_norm(x, (C,), m.vector, m.conv.bias.repeat(2)[:C], 1e-3), "layer", True, True),
    "layer_norm without weights": (lambda m, x: F.layer_norm(x, [C]), "layer", False, False),
    "layer_norm by keyword": (lambda m, x: F.layer_norm(x, normalized_shape=(C,), weight=m.vector), "layer", True, False),
    "rms_norm": (lambda m, x: F.rms_norm(x, (C,), m.vector, 1e-3), "rms", True, False),
    "rms_norm with torch's eps": (lambda m, x: F.rms_norm(x, (C,)), "rms", False, False),
    "llama": (llama, "rms", True, False),
    "gemma": (gemma, "rms", True, False),
    "no weight": (lambda m, x: x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5), "rms", False, False),
    "division": (lambda m, x: x / torch.sqrt(1e-5 + x.square().mean(-1, True)) * m.vector, "rms", True, False),
}  # fmt: skip
#: What stays.
KEPT = {
    "another reader": lambda m, x: F.layer_norm(x, (C,), m.vector) + x,
    "two axes": lambda m, x: F.layer_norm(x, (4, C)),
    "a mean over tokens": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),
    "another power": lambda m, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5),
    "no root": lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "the factor's other reader": lambda m, x: x * (f := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)) + f,
    "a narrower square": lambda m, x: (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-5)).double(),
    "a narrower result": lambda m, x: F.layer_norm(x, (C,)).float().double().float(),
    "eps that is a tensor": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.rows.mean()),
}


PASSES = FuseSites(), FuseNorms()


def fused(norm, *, passes=PASSES, branches="fgf", **options):
    """The rewritten module with random parameters, the same with the passes, and an input."""
    torch.manual_seed(0)

    def forward(m, x):
        for branch in branches:
            x = x + getattr(m, branch)(norm(m, x).to(m.f.weight.dtype))
        return x

    model, x = Model(forward).double(), torch.randn(2, 4, C, dtype=torch.float64)
    module = mhc_compile.rewrite(fx.symbolic_trace(model), x, options={"min_chain_length": 1, **options})
    scatter(module, 0.3)
    graph = run_passes(module.graph, passes)
    return module, fx.GraphModule(module, graph), x


def asked(module):
    """The norms of the operators that read, in order: kind, whether with gain, with shift."""
    reads = [node for node in module.graph.nodes if op_name(node) in ("read", "step", "shifted_step", "mix_read")]
    found = []
    for node in reads:
        at = next((i for i, one in enumerate(node.args) if one in ("rms", "layer")), None)
        kind = () if at is None else (node.args[at], node.args[at + 1] is not None, node.args[at + 2] is not None)
        found.append(kind)
    return found


def operations(module):
    return Counter(op_name(node) for node in module.graph.nodes)


def assert_equal(module, other, x):
    results = []
    parameters = list(module.parameters())
    for one in (module, other):
        out = one(x)
        loss = (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum()
        results.append([out, *torch.autograd.grad(loss, parameters, allow_unused=True)])
    for one, two in zip(*results, strict=True):
        assert (one is None) == (two is None)
        if one is not None and one.numel():
            assert (one - two).abs().max() <= 1e-11 * max(1.0, one.abs().max().item())


def some(names, *fast):
    """All names, of which the default run takes `fast`."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(FUSED, "layer_norm", "llama", "gemma", "division"))
def test_a_norm_becomes_part_of_the_read(name):
    norm, *kind = FUSED[name]
    module, after, x = fused(norm)
    assert asked(after) == [tuple(kind)] * 3
    gone = {"layer_norm", "rms_norm", "rsqrt", "sqrt", "square", "pow"}
    assert not gone & operations(after).keys()
    assert_equal(module, after, x)
    graph = after.graph
    assert FuseNorms().apply(graph) is graph


@pytest.mark.parametrize(
    "name", some(KEPT, "another reader", "a narrower square", "a narrower result", "without gradients")
)
def test_a_norm_stays(name):
    module, sites, x = fused(KEPT[name], passes=(FuseSites(),))
    graph = FuseNorms().apply(sites.graph)
    after = fx.GraphModule(sites, graph)
    if name == "a narrower result":  # what is narrower stays, the norm does not
        assert asked(after) == [("layer", False, False)] * 3
    else:
        assert asked(after) == [()] * 3
        assert operations(after) == operations(sites)
    assert_equal(module, after, x)


@pytest.mark.parametrize(
    ("options", "operators"),
    [
        (SINGLE_PASS, {"shifted_step": 2, "mix_read": 1}),
        (STATIC, {"mix_read": 2, "close": 1}),
    ],
)
def test_every_operator_that_reads_takes_a_norm(options, operators):
    module, after, x = fused(llama, **options)
    assert {name: operations(after)[name] for name in operators} == operators
    # The first read of both has no fused operator; the last collapse of a single pass no norm.
    assert Counter(asked(after)) == {("rms", True, False): 2, **({(): 1} if options is SINGLE_PASS else {})}
    assert_equal(module, after, x)


def test_weights_that_are_computed_later_are_brought_before_the_read():
    late = lambda m, x: F.rms_norm(x, (C,), 1 + m.vector * m.conv.bias.sum(), 1e-5)  # noqa: E731
    module, after, x = fused(late)
    assert asked(after) == [("rms", True, False)] * 3
    assert_equal(module, after, x)
    noisy = lambda m, x: F.rms_norm(x, (C,), m.vector + torch.rand_like(m.vector), 1e-5)  # noqa: E731
    # Random numbers stay where they are drawn: before the first read, after the others.
    assert asked(fused(noisy)[1]) == [("rms", True, False), (), ()]


@pytest.mark.parametrize("name", ["rms_norm", "add"])
def test_what_has_no_gradient_does_not_move(name):
    """A norm, or the weight of one, in a section without gradients."""
    late = lambda m, x: F.rms_norm(x, (C,), 1 + m.vector, 1e-5)  # noqa: E731
    _, sites, _ = fused(late, passes=PASSES[:1])
    (*_, node) = [one for one in sites.graph.nodes if op_name(one) == name and "mhc" not in one.name]
    for enabled, insert in ((False, sites.graph.inserting_before), (True, sites.graph.inserting_after)):
        with insert(node):
            sites.graph.call_function(torch._C._set_grad_enabled, (enabled,))
    after = fx.GraphModule(sites, FuseNorms().apply(sites.graph))
    assert asked(after) == [("rms", True, False), ("rms", True, False), ()]


def test_no_kernel_no_fusion(monkeypatch):
    monkeypatch.setattr("mhc_compile.ops.takes_norm", lambda *_: False)
    assert asked(fused(llama)[1]) == [()] * 3


def test_what_a_compiled_model_runs_moves_and_keeps(monkeypatch):
    """Counted of what Inductor makes of 8 sites: no kernel of a norm is left, and one [T, C] a site
    less is kept.
    """

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.f = nn.LayerNorm(64), nn.Linear(64, 64)

        def forward(self, x):
            return x + self.f(self.norm(x))

    def run():
        torch.manual_seed(0)
        model, x, seen, kept = nn.Sequential(*(Block() for _ in range(8))), torch.randn(2, 128, 64), [], {}
        torch._dynamo.reset()
        mhc_compile.attach(model, x)
        scatter(model, 0.3)
        compiled = torch.compile(model, backend="mhc")
        with caches(cold=False), observe_graphs(lambda *counts: seen.append(counts)):
            compiled(x).square().sum().backward()
        compiled.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            out = compiled(x)
        out.square().sum().backward()
        parameters = {one.data_ptr() for one in compiled.parameters()}
        total = sum(t.numel() for at, t in kept.items() if at not in parameters)
        kernels, _, moved = map(sum, zip(*seen, strict=True))
        return kernels, moved / (256 * 64 * 4), total / (256 * 64), [out, *(one.grad for one in compiled.parameters())]

    kernels, moved, kept, results = run()
    monkeypatch.setattr("mhc_compile.ops.takes_norm", lambda *_: False)
    unfused_kernels, unfused_moved, unfused_kept, wanted = run()
    assert kernels < 16 < 8 * 10 < unfused_kernels
    assert unfused_moved - moved >= 7 * 8
    assert 7.5 <= unfused_kept - kept <= 8.5
    for one, other in zip(results, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
