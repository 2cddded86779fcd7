"""The rewrite: operations are there, the numbers hold, other readers get the mean, a second run changes nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from graphs import C, Model
from torch import fx

import mhc_compile
from mhc_compile.passes.roles import op_name

mhc = torch.ops.mhc


def two_sites(m, x):
    x = x + m.f(m.norm(x))
    return x + m.g(m.norm(x))


def rewritten(forward, x=None, **options) -> tuple[fx.GraphModule, Model, torch.Tensor]:
    x = torch.randn(2, 4, C) if x is None else x
    model = Model(forward)
    return mhc_compile.rewrite(fx.symbolic_trace(model), x, options=options), model, x


def operations(module: fx.GraphModule) -> Counter[str]:
    return Counter(op_name(node) for node in module.graph.nodes if node.op == "call_function")


def test_adds_become_operations_on_streams():
    module, model, x = rewritten(two_sites)
    before = operations(fx.symbolic_trace(model))
    after = operations(module)
    assert before["add"] == 2
    assert after["add"] == 0
    assert (after["coefficients"], after["collapse"], after["update"], after["mean"]) == (2, 2, 2, 1)
    assert (module(x) - model(x)).abs().max() < 1e-6


def test_parameters_are_registered_under_the_owner():
    module, _, _ = rewritten(two_sites)
    added = sorted(name for name, _ in module.named_parameters() if "mhc" in name)
    assert added == [f"mhc.{branch}.{part}" for branch in "fg" for part in ("bias", "phi", "scale")]


def test_the_input_is_not_mutated():
    model = Model(two_sites)
    traced = fx.symbolic_trace(model)
    text, names = str(traced.graph), [name for name, _ in model.named_modules()]
    mhc_compile.rewrite(traced, torch.randn(2, 4, C))
    assert str(traced.graph) == text
    assert [name for name, _ in model.named_modules()] == names


def test_a_second_run_changes_nothing():
    module, _, x = rewritten(two_sites)
    again = mhc_compile.rewrite(module, x)
    assert str(again.graph) == str(module.graph)
    assert dict(again.named_parameters()).keys() == dict(module.named_parameters()).keys()


def test_other_readers_get_the_mean_of_the_streams():
    def forward(m, x):
        first = x + m.f(x)
        second = first + m.g(first)
        return second, first, x  # hidden states

    module, model, x = rewritten(forward)
    assert operations(module)["mean"] == 2
    torch.nn.init.normal_(module.mhc.f.bias)
    torch.nn.init.normal_(module.mhc.g.bias)
    second, first, same = module(x)
    assert torch.equal(same, x)
    # The first hidden state is the mean of the streams after the first site, with its own numbers.
    streams = x.unsqueeze(-2).expand(-1, -1, 4, -1)
    streams = module.mhc.f(streams, model.f)
    assert torch.allclose(first, streams.mean(-2), atol=1e-6)
    assert torch.allclose(second, module.mhc.g(streams, model.g).mean(-2), atol=1e-6)


def test_parallel_branches_are_one_site():
    module, model, x = rewritten(lambda m, x: (y := x + m.f(x) + m.g(m.norm(x))) + m.f(y))
    after = operations(module)
    assert (after["update"], after["add"]) == (2, 1)  # the one add joins the two branches
    assert (module(x) - model(x)).abs().max() < 1e-6


@pytest.mark.parametrize("view", ["reshape", "view", "flatten"])
def test_lifted_views_keep_the_numbers_of_unequal_streams(view):
    def forward(m, x):
        y = x + m.f(x)
        y = y.flatten(0, 1) if view == "flatten" else getattr(y, view)(-1, C)
        y = y + m.g(y)
        return y.reshape(2, 4, C)

    module, model, x = rewritten(forward)
    for name, parameter in module.named_parameters():
        if "mhc" in name:
            torch.nn.init.normal_(parameter)
    streams = module.mhc.f(x.unsqueeze(-2).expand(-1, -1, 4, -1), model.f)
    want = module.mhc.g(streams.reshape(8, 4, C), model.g).mean(-2).reshape(2, 4, C)
    assert torch.allclose(module(x), want, atol=1e-5)


def test_a_branch_that_reads_the_trunk_twice_reads_the_collapsed_streams_twice():
    module, model, x = rewritten(lambda m, x: (y := x + m.f(x) * torch.sigmoid(x)) + m.g(y))
    assert (module(x) - model(x)).abs().max() < 1e-6
    first = next(node for node in module.graph.nodes if node.target is mhc.collapse.default)
    assert len(first.users) == 2


def test_a_chain_that_starts_at_the_last_graph_input_comes_after_all_of_them():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.f = torch.nn.Linear(C, C)

        def forward(self, x, y):
            x = x + self.f(x)
            return (x + self.f(x)) * y

    model = Two()
    x, y = torch.randn(2, 4, C), torch.randn(2, 4, C)
    module = mhc_compile.rewrite(fx.symbolic_trace(model), x, y)
    kinds = [node.op for node in module.graph.nodes]
    assert kinds.index("call_method") > max(i for i, kind in enumerate(kinds) if kind == "placeholder")
    assert (module(x, y) - model(x, y)).abs().max() < 1e-6


def test_shared_modules_share_parameters():
    module, model, x = rewritten(lambda m, x: (y := x + m.f(x)) + m.f(y))
    assert sum(1 for name, _ in module.named_modules() if name == "mhc.f") == 1
    assert (module(x) - model(x)).abs().max() < 1e-6


def test_rewrite_says_what_is_wrong():
    with pytest.raises(mhc_compile.CaptureError, match=r"takes a torch\.fx\.GraphModule, got Linear"):
        mhc_compile.rewrite(torch.nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(mhc_compile.CaptureError, match=r"example inputs \(\[2, 4, 5\]\) do not fit"):
        rewritten(two_sites, torch.randn(2, 4, 5))
    with pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten"):
        rewritten(lambda m, x: m.f(x))
    with pytest.raises(mhc_compile.NothingRewrittenError, match="no addition of floating-point tensors"):
        rewritten(lambda m, x: m.f(x), strict=True)
