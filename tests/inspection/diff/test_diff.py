"""What `mhc_compile.diff` finds is what the backend does, and the plan that `explain` reports."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from helpers.builders import Decoder, Pair, points, tokens
from torch import nn

import mhc_compile
import mhc_compile.errors
from mhc_compile.inspection.diff.fold import new_parameters, sections
from mhc_compile.inspection.diff.results import Change
from mhc_compile.tools import zoo


def decoder(layers=3):
    torch.manual_seed(0)
    return Decoder(layers=layers)


def of_kind(diff, change):
    return [row for graph in diff.graphs for row in graph.rows if row.change is change]


def operations(diff):
    """Of the graph behind the diff, as its rows have them."""
    nodes = (row.after for graph in diff.graphs for row in graph.rows)
    return Counter(
        node.target.rpartition(".")[2].rstrip("_") for node in nodes if node is not None and node.op == "call"
    )


def rewritten(model, *args, **options):
    """The graphs that the backend hands to its inner compiler."""
    graphs = []

    def inner_backend(graph_module, inputs):
        graphs.append(graph_module.graph)
        return graph_module.forward

    torch.compile(model, backend="mhc", options={"inner_backend": inner_backend, **options})(*args)
    return graphs


def test_every_residual_add_is_replaced_and_nothing_else_is_removed():
    diff = mhc_compile.diff(decoder(), tokens())
    assert (diff.before, diff.after) == ("capture", "expand")
    replaced = of_kind(diff, Change.REPLACED)
    assert len(replaced) == 6
    assert {row.before.target for row in replaced} <= {"add", "torch.add", "iadd"}
    assert {row.after.target for row in replaced} == {"mhc.update"}
    assert [row.before.site for row in replaced] == [row.after.site for row in replaced]
    assert not of_kind(diff, Change.REMOVED)
    added = Counter(row.after.target for row in of_kind(diff, Change.ADDED) if row.after.op == "call")
    assert added["mhc.coefficients"] == added["mhc.collapse"] == 6
    assert added["getitem"] == 18


def test_diff_shows_the_graph_that_the_inner_compiler_gets():
    model = decoder()
    diff = mhc_compile.diff(model, tokens(), options={"inner_backend": "eager"}, stage="capture..lower")
    (graph,) = rewritten(copy.deepcopy(model), tokens())
    assert sum(operations(diff).values()) == sum(node.op.startswith("call_") for node in graph.nodes)
    ours = Counter(str(node.target).removesuffix(".default") for node in graph.nodes if "mhc." in str(node.target))
    assert {name: operations(diff)[name.rpartition(".")[2]] for name in ours} == dict(ours)


def test_the_model_stays_as_it_is():
    model = decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = [len(group["params"]) for group in optimizer.param_groups]
    mhc_compile.diff(model, tokens())
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_changed_plan_changes_explain_diff_and_rewrite():
    """All three read one plan: a chain that an option takes out of it is out everywhere."""

    def seen(**options):
        model, x = nn.Sequential(Pair(3), nn.Linear(3, 4), Pair(4), Pair(4)), points()
        explained = mhc_compile.explain(model, x, options=options)
        diff = mhc_compile.diff(model, x, options={"inner_backend": "eager", **options})
        graphs = rewritten(model, x, **options)
        updates = sum("mhc.update" in str(node.target) for graph in graphs for node in graph.nodes)
        return (
            [site.path for site in explained.sites],
            [row.after.site for row in of_kind(diff, Change.REPLACED)],
            updates,
            explained.reasons["chain-too-short"],
        )

    sites, replaced, updates, rejected = seen()
    assert sites == replaced
    assert (len(sites), updates, rejected) == (6, 6, 0)
    fewer, replaced, updates, rejected = seen(min_chain_length=3)
    assert fewer == replaced == sites[2:]
    assert (updates, rejected) == (4, 2)


def test_layers_that_are_changed_alike_are_one():
    (graph,) = mhc_compile.diff(decoder(5), tokens()).graphs
    repeated = [section for section in sections(graph.rows) if section.like]
    assert [(section.path, section.others, section.like) for section in repeated] == [
        ("blocks.1", ("blocks.2", "blocks.3", "blocks.4"), "blocks.0")
    ]
    assert sum(parameters.count for parameters in new_parameters(graph.rows)) == 10


class Odd(nn.Module):
    """Its third block is not like the others."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(4))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = x + (2 * block(x) if number == 2 else block(x))
        return x


def test_a_layer_that_is_changed_in_another_way_is_shown():
    (graph,) = mhc_compile.diff(Odd(), torch.randn(2, 8)).graphs
    found = sections(graph.rows)
    shown = [section.path for section in found if not section.like]
    assert "blocks.0" in shown[0] or "blocks.0" in shown
    assert all(section.like != "blocks.1" for section in found)


def test_stages():
    model = decoder()
    plan = mhc_compile.diff(model, tokens(), stage="plan")
    assert (plan.before, plan.after) == ("normalize", "plan")
    marked = of_kind(plan, Change.MARKED)
    explained = mhc_compile.explain(model, tokens())
    assert [row.after.site for row in marked if row.after.role == "site"] == [site.path for site in explained.sites]
    assert Counter(row.after.reason for row in marked if row.after.role == "skipped") == explained.reasons
    fused = mhc_compile.diff(model, tokens(), stage="fuse-sites")
    assert fused.before == "fold-scales"
    assert "mhc.step" in {row.after.target for row in of_kind(fused, Change.ADDED)}
    same = mhc_compile.diff(model, tokens(), stage="normalize..normalize")
    assert set(same.changes) == {Change.SAME}


def test_changes_of_each_pass_are_shown():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.f(x)
            y += x
            return y + self.g(y)

    diff = mhc_compile.diff(InPlace(), torch.randn(2, 8), stage="normalize")
    changed = [row for row in diff.graphs[0].rows if row.change is not Change.SAME]
    assert next((row.change, row.before.target, row.after.target) for row in changed) == (
        Change.REPLACED,
        "iadd",
        "torch.add",
    )
    assert len(of_kind(mhc_compile.diff(InPlace(), torch.randn(2, 8)), Change.REPLACED)) == 2


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("fuse-step", "did you mean 'fuse-sites'"),
        ("expand..plan", "'expand' does not come before 'plan'"),
        ("", "stage '' is unknown; known stages: trace"),
    ],
)
def test_a_stage_that_does_not_exist(stage, words):
    with pytest.raises(mhc_compile.errors.OptionError, match=words):
        mhc_compile.diff(decoder(1), tokens(), stage=stage)


@pytest.mark.slow
def test_a_program():
    model = decoder()
    program = torch.export.export(model, (tokens(),))
    diff = mhc_compile.diff(program)
    assert diff.model == "Decoder"
    assert len(of_kind(diff, Change.REPLACED)) == 6
    lowered = mhc_compile.diff(program, stage="capture..lower")
    assert not any("mhc." in node.target for node in (row.after for row in lowered.graphs[0].rows) if node is not None)
    after = mhc_compile.rewrite(program)
    calls = sum(node.op == "call_function" for node in after.graph.nodes)
    assert sum(row.after is not None and row.after.op == "call" for row in lowered.graphs[0].rows) == calls


def test_an_attached_model_shows_the_parameters_that_it_has():
    model = decoder()
    fresh = mhc_compile.diff(model, tokens())
    mhc_compile.attach(model, tokens())
    attached = mhc_compile.diff(model, tokens())
    assert new_parameters(fresh.graphs[0].rows)
    assert not new_parameters(attached.graphs[0].rows)
    assert fresh.changes[Change.REPLACED] == attached.changes[Change.REPLACED] == 6


@pytest.mark.parametrize(
    "name",
    [
        "swin",
        "resnet",
        "checkpointed",
        "trap-cubic-gelu",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "mamba")),
    ],
)
def test_families(name):
    model, args, kwargs = zoo.get(name).build(2)
    explained = mhc_compile.explain(model, *args, **kwargs)
    diff = mhc_compile.diff(model, *args, **kwargs)
    sites = [site.path for site in explained.sites]
    assert sorted(row.after.site for row in of_kind(diff, Change.REPLACED) if row.after.site) == sorted(sites)
    data = diff.to_dict()
    assert data["schema"] == "mhc-compile/diff/1"
    for graph in data["graphs"]:
        assert [row["before"] for row in graph["rows"] if row["before"] is not None] == list(
            range(len(graph["before"]))
        )
        assert [row["after"] for row in graph["rows"] if row["after"] is not None] == list(range(len(graph["after"])))


class Cut(nn.Module):
    """Its branch begins in one graph and ends in the next."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.up(x)
        torch._dynamo.graph_break()
        return x + self.down(h.relu())


def test_both_halves_of_a_branch_that_a_graph_break_cuts():
    diff = mhc_compile.diff(nn.Sequential(Cut(), Cut()), torch.randn(2, 8))
    head, tail = diff.graphs
    assert head.modules == tail.modules == ("0", "1")
    opened = [row.after for row in head.rows if row.change is Change.ADDED and row.after.op == "call"]
    assert [node.target for node in opened if node.target.startswith("mhc.")] == ["mhc.coefficients", "mhc.collapse"]
    assert {node.site for node in opened} == {"0.mhc.down"}
    (closed,) = [row for row in tail.rows if row.change is Change.REPLACED]
    assert (closed.before.site, closed.after.site, closed.after.target) == ("0.mhc.down", "0.mhc.down", "mhc.update")
