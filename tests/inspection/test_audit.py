"""`mhc_compile.audit`: what is counted, for whom, and how little a call pays for it."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from helpers.builders import Decoder, tokens
from torch import nn

import mhc_compile
from mhc_compile.attachment import ledger

EAGER = {"inner_backend": "eager"}


def counts(model):
    return [site.computed for site in mhc_compile.audit(model).sites]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_every_call_of_a_graph_counts_for_the_parameters_it_got(one_by_one):
    model = Decoder()
    if one_by_one:  # the blocks share one graph
        for block in model.blocks:
            block.compile(backend="mhc", options=EAGER)
    compiled = model if one_by_one else torch.compile(model, backend="mhc", options=EAGER)
    for _ in range(3):
        compiled(tokens())
    result = mhc_compile.audit(compiled)
    assert counts(model) == [3, 3, 3, 3]
    assert result.ok
    assert result.model == "Decoder"
    assert [site.path for site in result.sites] == list(mhc_compile.connections(model))
    for site in result.sites:
        (use,) = site.graphs
        assert (use.inner_backend, use.graphs) == ("eager", 1)
        assert "builders.py:" in use.frame
        assert site.computed_since is not None
        assert site.last_plain is None
    model.blocks[0](torch.randn(2, 5, 8)) if one_by_one else None
    assert counts(model) == ([4, 4, 3, 3] if one_by_one else [3, 3, 3, 3])


@pytest.mark.slow
def test_copies_start_at_zero():
    model = Decoder()
    torch.compile(model, backend="mhc", options=EAGER)(tokens())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert counts(other) == [0, 0, 0, 0]
        torch.compile(other, backend="mhc", options=EAGER)(tokens())  # by the graph of the first
        assert counts(other) == [1, 1, 1, 1]
    assert counts(model) == [1, 1, 1, 1]


def test_models_die():
    model = Decoder()
    torch.compile(model, backend="mhc", options=EAGER)(tokens())
    connections = [weakref.ref(connection) for connection in mhc_compile.connections(model).values()]
    parameters = [weakref.ref(connection.phi) for connection in mhc_compile.connections(model).values()]
    torch._dynamo.reset()
    del model
    gc.collect()
    assert [reference() for reference in (*connections, *parameters)] == [None] * 8


def test_plain_runs_are_counted_and_shown():
    model = Decoder()
    mhc_compile.attach(model, tokens(), options=EAGER)
    connections = list(mhc_compile.connections(model).values())
    assert "4 never computed" in str(mhc_compile.audit(model))
    assert ledger.ran_plain(connections[0])
    result = mhc_compile.audit(model)
    assert not result.ok
    assert [site.path for site in result.plain] == ["blocks.0.mhc.attn"]
    assert result.plain[0].last_plain is not None
    assert len(result.idle) == 4
    assert "4 never computed, 1 ran plain" in str(result)
    assert result.to_dict()["schema"] == "mhc-compile/audit/1"


def test_a_branch_whose_middle_runs_outside_is_not_plain():
    class Untraced(nn.Linear):
        @torch.compiler.disable
        def forward(self, x):
            return super().forward(x)

    model = Decoder()
    for block in model.blocks:
        block.mlp = Untraced(8, 8)
    mhc_compile.attach(model, tokens(), options=EAGER)
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    compiled(tokens())
    compiled(tokens())
    assert [(site.computed, site.plain) for site in mhc_compile.audit(model).sites] == [(2, 0)] * 4


def test_a_call_costs_a_look_up_for_each_site():
    """With 24 sites, 1 % of a step of 10 ms is 4 µs for each: some twenty operations of Python."""
    model = Decoder()
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    for _ in range(2):
        compiled(tokens())
    calls, builtins = [], []

    def profile(frame, event, argument):
        if frame.f_code.co_filename == ledger.__file__:
            (calls if event == "call" else builtins if event == "c_call" else []).append(argument)

    sys.setprofile(profile)
    try:
        compiled(tokens())
    finally:
        sys.setprofile(None)
    assert counts(model) == [3] * 4
    assert len(calls) == 1
    assert 4 <= len(builtins) <= 3 * 4  # id, get, and the weak reference


@pytest.mark.slow
def test_check_reports_sites_that_are_not_computed_in_each_call():
    class Every(nn.Module):
        """Runs its second block in every other call, which no shape shows."""

        def __init__(self):
            super().__init__()
            self.model, self.turn = Decoder(layers=3), 0

        @torch.compiler.disable
        def skips(self):
            self.turn += 1
            return self.turn % 2 == 1

        def forward(self, x):
            x = self.model.embed(x)
            for number, block in enumerate(self.model.blocks):
                if number != 1 or not self.skips():
                    x = block(x)
            return self.model.head(x)

    result = mhc_compile.check(Every(), tokens(), options=EAGER)
    assert result.missed == {"model.blocks.1.mhc.attn": 1, "model.blocks.1.mhc.mlp": 1}
    assert any("are not computed in each call: model.blocks.1.mhc.attn 1 times in 2" in one for one in result.findings)
    assert mhc_compile.check(Decoder(), tokens(), options=EAGER).missed == {}
