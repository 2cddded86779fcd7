"""Every reason has a program that gets it.

The table in the documentation of `Reason` is held against the same programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from helpers.graphs import C, Model, planned
from torch import nn

import mhc_compile
from mhc_compile.errors import NothingRewrittenError
from mhc_compile.passes import Reason, normalize, plan_chains
from mhc_compile.passes.analysis.provenance import Provenance
from mhc_compile.passes.transforms import expand_streams

if TYPE_CHECKING:
    from mhc_compile.passes.analysis.provenance import ModuleRef

R = Reason


def blocks(m, x):
    for _ in range(2):
        x = x + m.f(x)
    return x


#: One program for every reason that the graph alone decides.
PROGRAMS = {
    R.BROADCAST: lambda m, x: m.f(x) + m.vector,
    R.DTYPE: lambda m, x: torch.complex(x, x) + torch.complex(m.f(x), x),
    R.NO_FEATURE_AXIS: lambda m, x: x.sum() + m.f(x).sum(),
    R.SAME_VALUE: lambda m, x: x + x,
    R.INDEPENDENT: lambda m, x: m.f(x) + m.g(x),
    R.NOT_DIFFERENTIABLE: lambda m, x: x + m.f(x).detach(),
    R.NO_CONTRACTION: lambda m, x: x + 0.044715 * x**3,
    R.TOKEN_SHIFT: lambda m, x: x[:, 1:] + torch.sigmoid(m.f(x[:, 1:])) * x[:, :-1],
    R.PROJECTED_SKIP: lambda m, x: m.conv(x) + m.f(torch.relu(m.g(x))),
    R.MULTI_STREAM: lambda m, x: (torch.softmax(m.conv(x)[..., :4], -1) @ x) + m.f(m.g(x)),
    R.SIDE_ADD: lambda m, x: x + m.f(x + m.g(x)),
    R.LONG_SKIP: lambda m, x: (y := x + m.f(x)) * 0 + (x + blocks(m, y)),
    R.FEATURE_AXIS: lambda m, x: x + m.f(x.reshape(2, -1)[:, :C]).unsqueeze(1).expand(2, 4, C),
    R.MUTATED_OPERAND: lambda m, x: ((y := x + m.f(x)), y[:, 0].zero_(), y)[0],
}


@pytest.mark.parametrize("reason", PROGRAMS, ids=lambda reason: reason.value)
def test_reasons_that_the_graph_decides(reason):
    rejections = planned(PROGRAMS[reason]).rejections
    assert reason in {rejection.reason for rejection in rejections}
    assert all(rejection.message for rejection in rejections)


def test_chain_too_short():
    plan = planned(lambda m, x: x + m.f(x), min_chain_length=2)
    assert [rejection.reason for rejection in plan.rejections] == [R.CHAIN_TOO_SHORT]


def test_rewritten():
    from helpers.graphs import trace

    module = mhc_compile.rewrite(trace(lambda m, x: m.g(x + blocks(m, x))), torch.randn(2, 4, C))
    plan = plan_chains(normalize(module.graph), Provenance())
    assert [rejection.reason for rejection in plan.rejections] == [R.REWRITTEN]


def test_dynamic_width():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 1)

        def forward(self, x):
            return x + F.softmax(x, -1) @ F.layer_norm(x, x.shape[-1:]).transpose(1, 2) @ self.conv(x)

    x = torch.randn(2, 4, 6)
    torch._dynamo.mark_dynamic(x, 2)
    reasons = mhc_compile.explain(Net(), x, options={"min_chain_length": 1}).reasons
    assert reasons == {R.DYNAMIC_WIDTH.value: 1}


def test_a_width_that_a_layer_has_proven_is_fixed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    x = torch.randn(2, 4, 6)
    torch._dynamo.maybe_mark_dynamic(x, [0, 1, 2])
    explanation = mhc_compile.explain(Net(), x, options={"min_chain_length": 1})
    assert (len(explanation.sites), explanation.reasons) == (1, {})


def test_broken_branch():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.expert = nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x):
            x = x + self.f(x)
            return x + self.route(x)

        @torch.compiler.disable
        def route(self, x):
            return self.expert(x)

    reasons = mhc_compile.explain(Routed(), torch.randn(2, 4, C), options={"min_chain_length": 1}).reasons
    assert reasons == {R.BROKEN_BRANCH.value: 1}


def test_no_owner():
    class Nowhere(Provenance):
        def stack(self, node) -> tuple[ModuleRef, ...]:
            return ()

    from helpers.graphs import trace

    plan = plan_chains(normalize(trace(blocks).graph), Nowhere())
    assert {rejection.reason for rejection in plan.rejections} == {R.NO_OWNER}


def test_no_carrier():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(C, C))

        def forward(self, x):
            return x + x @ self.weight

    assert mhc_compile.explain(Net(), torch.randn(2, 4, C)).reasons == {R.NO_CARRIER.value: 1}


def test_not_declared(caplog):
    """The carrier's hook was taken off by somebody else: its parameters do not enter the graph."""
    model = Model(blocks)
    x = torch.randn(2, 4, C)
    mhc_compile.attach(model, x)
    seen = []
    model.f._forward_pre_hooks.clear()
    with caplog.at_level("DEBUG", "mhc_compile"):
        torch.compile(
            model, backend="mhc", options={"inner_backend": lambda gm, inputs: seen.append(gm) or gm.forward}
        )(x)
    assert not any(node.target is torch.ops.mhc.update.default for node in seen[0].graph.nodes)
    assert "not-declared" in caplog.text


def test_width_conflict(caplog):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.f(F.layer_norm(x, x.shape[-1:]))

    model = Net()
    mhc_compile.attach(model, torch.randn(2, 4, 6), options={"min_chain_length": 1})
    compiled = torch.compile(model, backend="mhc", options={"min_chain_length": 1, "inner_backend": "eager"})
    told = pytest.warns(mhc_compile.MhcWarning, match=r"no part in a graph .*\(mhc\.f\).* 1 × width-conflict")
    with told, caplog.at_level("DEBUG", "mhc_compile"):
        compiled(torch.randn(2, 4, 8))
    assert "width-conflict" in caplog.text


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_tensor_subclass():
    """Jagged tensors run plain. Where that leaves hyper-connections without streams, it is said."""
    model, dense = Model(blocks), torch.randn(3, C)
    jagged = torch.nested.nested_tensor([dense, dense[:2]], layout=torch.jagged)
    want = model(dense)
    with pytest.warns(mhc_compile.MhcWarning, match=r"nothing was rewritten: .* \(2 × tensor-subclass\)"):
        got = torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager"})(jagged)
    assert torch.allclose(got.unbind()[0], want)
    assert not mhc_compile.connections(model)
    assert mhc_compile.explain(model, jagged).reasons == {"tensor-subclass": 2}
    mhc_compile.attach(model, dense)
    with pytest.warns(mhc_compile.MhcWarning, match=r"no part in a graph .*\(mhc\.f\).* 2 × tensor-subclass"):
        torch.compile(model, backend="mhc", options={"inner_backend": "eager"})(jagged)
    with pytest.raises(NothingRewrittenError, match="tensor-subclass"):
        torch.compile(model, backend="mhc", options={"inner_backend": "eager", "strict": True})(jagged)


def test_rewrite_failed():
    def fail(*args):
        raise ValueError("no streams here")

    model, x = Model(blocks), torch.randn(2, 4, C)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand_streams.ExpandStreams, "apply", fail)
        explained, details = mhc_compile.explain(model, x), mhc_compile.why(model, x, node="x")
    assert explained.reasons == {"rewrite-failed": 2}
    assert details.rejections[0].message == "ValueError: no streams here"
    assert mhc_compile.explain(model, x).reasons == {}


def test_every_reason_has_a_program_here_and_says_what_it_means():
    tested = {reason.value for reason in PROGRAMS} | {
        name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")
    }
    assert tested >= {reason.value for reason in Reason}
    told = [(reason.meaning, reason.example, reason.remedy) for reason in Reason]
    assert all(all(parts) for parts in told)
    assert len({meaning for meaning, *_ in told}) == len(Reason)
