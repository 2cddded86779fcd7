"""`explain`: the plan of the rewrite, as data and as text."""

from __future__ import annotations

import io
import json

import pytest
import torch
from helpers.builders import LAYERS, Decoder, Pair, build, tokens
from rich.console import Console
from torch import nn

import mhc_compile
import mhc_compile.errors
from mhc_compile.passes.planning import planner as study


def text(explanation, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(explanation)
    return console.file.getvalue()


def test_data():
    model = Decoder()
    explanation = mhc_compile.explain(model, tokens())
    assert explanation.model == "Decoder"
    assert [site.path for site in explanation.sites][:2] == ["blocks.0.mhc.attn", "blocks.0.mhc.mlp"]
    assert [site.index for site in explanation.sites] == list(range(2 * LAYERS))
    assert {site.owner_kind for site in explanation.sites} == {"Block"}
    assert all("builders.py:" in site.source for site in explanation.sites)
    assert not mhc_compile.connections(model)  # nothing is changed
    assert not explanation.rejections


def test_costs_are_those_of_the_attached_model():
    model = Decoder()
    explanation = mhc_compile.explain(model, tokens())
    before = sum(p.numel() for p in model.parameters())
    assert explanation.parameters == before
    mhc_compile.attach(model, tokens())
    assert sum(p.numel() for p in model.parameters()) - before == explanation.cost.parameters
    again = mhc_compile.explain(model, tokens())
    assert again.parameters == before
    assert again.cost == explanation.cost
    n, c = 4, 8
    assert explanation.cost.bytes_floor == 2 * LAYERS * (2 * n + 2) * c * 4
    assert explanation.cost.flops == 2 * LAYERS * (2 * n * c * 24 + 6 * n * c + 2 * n * n * c + 4 * n * n * 20)


def test_plain_flops_are_counted():
    explanation = mhc_compile.explain(Decoder(), tokens(2, 5))
    width, layers = 8, LAYERS
    linear = layers * 2 * (3 * width**2 + width**2 + 4 * width**2) + 2 * width * 11
    attention = layers * 2 * 2 * 5 * width
    assert explanation.plain_flops_per_token == pytest.approx(linear + attention)


def test_flops_per_token_are_unknown_if_chains_have_different_numbers_of_tokens():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Pair(8), Pair(8)

        def forward(self, source, target):
            return self.decoder(target) + self.encoder(source).mean(0)

    same = mhc_compile.explain(Two(), torch.randn(6, 8), torch.randn(6, 8))
    other = mhc_compile.explain(Two(), torch.randn(6, 8), torch.randn(3, 8))
    assert [len(same.chains), len(other.chains)] == [2, 2]
    assert same.plain_flops_per_token == 2 * 2 * 2 * 8 * 8
    assert other.plain_flops_per_token is None
    assert other.plain.flops == 9 * 2 * 2 * 8 * 8


def test_json_is_plain_data():
    explanation = mhc_compile.explain(build("gpt2").model, **build("gpt2").inputs)
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["reasons"] == {"broadcast": 1, "no-contraction": LAYERS}
    assert len(data["graphs"][0]["chains"][0]["sites"]) == 2 * LAYERS
    assert data["options"]["streams"] == 4


@pytest.mark.parametrize("width", [80, 140])
def test_the_report_collapses_layers_and_fits(width):
    case = build("gpt2")
    shown = text(mhc_compile.explain(case.model, **case.inputs), width)
    assert max(map(len, shown.splitlines())) <= width
    assert f"GPT2LMHeadModel: {2 * LAYERS} residual adds rewritten, {LAYERS + 1} additions skipped" in shown
    assert f"transformer.h.0 … transformer.h.{LAYERS - 1}  ({LAYERS} × GPT2Block)" in shown
    assert "x + attn(x)  modeling_gpt2.py:" in shown
    assert "no-contraction" in shown
    assert "Parameters" in shown


def test_the_report_of_a_model_without_sites():
    shown = text(mhc_compile.explain(nn.Linear(2, 2), torch.randn(3, 2)))
    assert "Nothing would be rewritten" in shown


def test_a_changed_plan_changes_the_report_and_the_rewrite(monkeypatch):
    """Both read the plan that `study` makes: a site rejected there is missing from both."""
    original = study.plan_chains

    def without_last_block(graph, provenance, **settings):
        return original(graph, provenance, **{**settings, "reject": _reject_last})

    monkeypatch.setattr(study, "plan_chains", without_last_block)
    model = Decoder()
    assert len(mhc_compile.explain(model, tokens()).sites) == 2 * LAYERS - 1
    torch.compile(model, backend="mhc", options={"inner_backend": "eager"})(tokens())
    assert len(mhc_compile.connections(model)) == 2 * LAYERS - 1


def _reject_last(site):
    from mhc_compile.passes import Reason
    from mhc_compile.passes.planning.chain_rejections import reject_site

    if site.path == f"blocks.{LAYERS - 1}.mhc.mlp":
        return reject_site(site, Reason.NO_OWNER, lambda: "for the test")
    return None


@pytest.mark.parametrize(("lr", "steps"), [(0.0, 10), (-1e-3, 10), (float("nan"), 10), (float("inf"), 10), (1e-3, 0)])
def test_a_training_that_is_none_is_rejected(lr, steps):
    explanation = mhc_compile.explain(Decoder(), tokens())
    assert explanation.in_training(1e-3, 10).training.total == pytest.approx(1e-2)
    with pytest.raises(mhc_compile.errors.OptionError, match=rf"got lr={lr}, steps={steps}; expected a positive"):
        explanation.in_training(lr, steps)


def test_a_graph_break_gives_two_graphs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Decoder(), nn.Linear(11, 11)

        def forward(self, ids):
            x = self.first(ids)
            torch._dynamo.graph_break()
            return self.second(x)

    explanation = mhc_compile.explain(Broken(), tokens())
    assert len(explanation.graphs) == 2
    assert len(explanation.sites) == 2 * LAYERS


def test_integers_between_graphs_are_computed():
    """A model that breaks its graph to count tokens takes the same path as when it runs; a zero
    would not.
    """

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block = torch.nn.Embedding(7, 6), torch.nn.Linear(6, 6)

        def forward(self, ids):
            x = self.embed(ids)
            if int((ids == 3).sum()) != 2:
                raise ValueError("expected two tokens 3")
            for _ in range(2):
                x = x + self.block(x)
            return x

    explanation = mhc_compile.explain(Net(), torch.tensor([[3, 1, 3, 2]]))
    assert len(explanation.sites) == 2
    assert len(explanation.graphs) > 1
    with pytest.raises(mhc_compile.errors.CaptureError, match="expected two tokens 3"):
        mhc_compile.explain(Net(), torch.tensor([[3, 1, 1, 2]]))
