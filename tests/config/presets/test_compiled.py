"""Presets in a compiled model: what the passes write against the same sites put together by hand,
in float64.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.builders import LAYERS, Decoder, tokens, twin
from torch import Tensor

import mhc_compile
from mhc_compile.errors import AttachError, OptionError

WIDTH = 6
#: Cases whose sites are fused to different operators.
FUSED = ("deepseek-v4", "deepseek-v4.1", "static")
CASES = {
    "deepseek-v4": {"preset": "deepseek-v4"},
    "glm5-next": {"preset": "glm5-next"},
    "hy-v4": {"preset": "hy-v4"},
    "liger": {"preset": "liger"},
    "deepseek-v4.1": {"preset": "deepseek-v4.1"},
    "qwen4-exp": {"preset": "qwen4-exp", "rank": 3, "init": "random"},
    "sum": {"read_out": "sum", "init": "random"},
    "static": {"token_dependent": False},
    "sites": {"overrides": {"blocks.*.mlp": {"mapping": "identity"}, "blocks.1.*": {"token_dependent": False}}},
}


def _branch(norm, f):
    return lambda h: f(norm(h))


def by_hand(model: Decoder, ids: Tensor) -> Tensor:
    with warnings.catch_warnings():  # that branches run outside a compiled graph
        warnings.simplefilter("ignore", mhc_compile.MhcWarning)
        return _by_hand(model, ids)


def _by_hand(model: Decoder, ids: Tensor) -> Tensor:
    x = model.embed(ids)
    X = torch.stack([x] * 4, dim=-2)
    passed = None
    for block in model.blocks:
        for name, norm in (("attn", block.norm1), ("mlp", block.norm2)):
            f = _branch(norm, getattr(block, name))
            site = block.mhc.get(name)
            if site.single_pass:
                pre, post, res = site.coefficients(X)
                h = x if passed is None else torch.einsum("...n,...nc->...c", passed, X)
                X = torch.einsum("...ij,...jc->...ic", res, X) + post.unsqueeze(-1) * f(h).unsqueeze(-2)
                passed = pre
            else:
                X = site(X, f)
    if passed is not None:
        end = torch.einsum("...n,...nc->...c", passed, X)
    elif site.read_out is not None:
        end = site.read_out(X)
    else:
        end = X.sum(-2) if site.end == "sum" else X.mean(-2)
    return model.head(model.norm(end))


def randomised(options: dict) -> tuple[Decoder, Tensor]:
    model, ids = Decoder(width=WIDTH).double(), tokens()
    mhc_compile.attach(model, ids, options=options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mhc." in name:
                parameter.normal_(std=0.5)
    return model, ids


@pytest.mark.parametrize(
    ("case", "inner_backend"),
    [("qwen4-exp", "eager"), ("sites", "eager"), ("deepseek-v4.1", "eager")]
    + [
        pytest.param(case, "aot_eager", marks=() if case in FUSED else pytest.mark.slow)  # with fused operators
        for case in CASES
    ]
    + [
        pytest.param(case, "inductor", marks=pytest.mark.slow)
        for case in ("deepseek-v4", "deepseek-v4.1", "qwen4-exp", "static")
    ],
)
def test_forward_and_gradients_equal_the_sites_by_hand(case, inner_backend):
    model, ids = randomised(CASES[case])
    want = by_hand(model, ids)
    weight = torch.randn_like(want)
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad((want * weight).sum(), list(parameters.values()), allow_unused=True)
    got = torch.compile(model, backend="mhc", options={**CASES[case], "inner_backend": inner_backend, "strict": True})(
        ids
    )
    assert (got - want).abs().max() < 1e-11
    found = torch.autograd.grad((got * weight).sum(), list(parameters.values()), allow_unused=True)
    for name, mine, theirs in zip(parameters, found, expected, strict=True):
        # In a single pass the last site's weights end the chain, so none is unused; empty
        # parameters have empty gradients.
        mine, theirs = (torch.zeros(1) if value is None else value for value in (mine, theirs))
        if mine.numel():
            assert (mine - theirs).abs().max() < 1e-10 * max(1.0, theirs.abs().max().item()), name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in ("deepseek-v4", "hy-v4") else pytest.mark.slow)
        for case in CASES
        if "init" not in CASES[case]
    ],
)
def test_the_start_is_the_plain_model(case):
    """To rounding; with an epsilon in Sinkhorn the rows sum to 1 - eps, so that a site loses a
    millionth of its streams.
    """
    plain = Decoder(width=WIDTH).double()
    model, ids = twin(plain), tokens()
    want, got = plain(ids), torch.compile(model, backend="mhc", options={**CASES[case], "inner_backend": "eager"})(ids)
    loses = "sinkhorn_eps" in next(iter(mhc_compile.connections(model).values())).spec
    assert (got - want).abs().max() < (5e-6 * 2 * LAYERS if loses else 1e-13)
    assert loses == (case in {"deepseek-v4", "glm5-next", "liger", "deepseek-v4.1"})


def test_sites_of_their_own_kind():
    model, _ = randomised(CASES["sites"])
    kinds = {path: (c.mapping, c.token_dependent) for path, c in mhc_compile.connections(model).items()}
    assert kinds == {
        "blocks.0.mhc.attn": ("sinkhorn", True),
        "blocks.0.mhc.mlp": ("identity", True),
        "blocks.1.mhc.attn": ("sinkhorn", False),
        "blocks.1.mhc.mlp": ("identity", False),
    }


def test_another_preset_than_the_one_that_is_attached_is_an_error():
    model, ids = randomised({"preset": "deepseek-v4"})
    with pytest.raises(AttachError, match="preset='deepseek-v4', the options say preset='glm5-next'"):
        torch.compile(model, backend="mhc", options={"preset": "glm5-next", "inner_backend": "eager"})(ids)


@pytest.mark.parametrize("options", [{"preset": "deepseek-v4"}, {"preset": "deepseek-v4.1"}])
def test_a_chain_in_pieces_can_not_end_in_a_learned_way(options):
    class Broken(Decoder):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return self.head(self.norm(x))

    model, ids = Broken(width=WIDTH), tokens()
    with pytest.raises(AttachError, match="runs through several graphs"):
        torch.compile(model, backend="mhc", options={**options, "inner_backend": "eager"})(ids)


def test_a_learned_read_out_outside_a_checkpointed_block():
    class Saving(Decoder):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x))

    torch.manual_seed(3)
    model, ids = randomised({"preset": "deepseek-v4"})
    saving = Saving(width=WIDTH).double()
    mhc_compile.attach(saving, ids, options={"preset": "deepseek-v4"})
    saving.load_state_dict(model.state_dict())
    options = {"preset": "deepseek-v4", "inner_backend": "aot_eager", "strict": True}
    assert (torch.compile(saving, backend="mhc", options=options)(ids) - by_hand(model, ids)).abs().max() < 1e-11


def test_the_optimizer_gets_the_read_out_too():
    model, ids = Decoder(width=WIDTH), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled = torch.compile(model, backend="mhc", options={"preset": "deepseek-v4", "inner_backend": "eager"})
    compiled(ids).sum().backward()
    weight = model.get_parameter("blocks.1.mhc.mlp.read_out.weight")
    assert any(parameter is weight for group in optimizer.param_groups for parameter in group["params"])
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, weight)


def test_a_state_dict_goes_round(tmp_path):
    model, ids = randomised({"preset": "deepseek-v4"})
    other, _ = randomised({"preset": "deepseek-v4"})
    assert not torch.equal(by_hand(other, ids), by_hand(model, ids))
    mhc_compile.load_state_dict(other, model.state_dict())
    assert torch.equal(by_hand(other, ids), by_hand(model, ids))
    plain = Decoder(width=WIDTH).double()
    with pytest.warns(mhc_compile.MhcWarning, match="looks like one of the plain model"):
        other.load_state_dict(plain.state_dict())  # strict: neither connections nor read-out are missed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "deepseek-v5"}, "preset 'deepseek-v5' is unknown; did you mean 'deepseek-v4'"),
        ({"preset": "qwen4-exp"}, "no parameters make that the plain residual add. Add init='random'"),
        ({"read_out": "sum"}, "read_out='sum' adds 4 equal streams up"),
        (
            {"read_out": "max"},
            "option 'read_out' is 'max'; did you mean 'mean'? expected one of 'mean', 'sum', 'learned'",
        ),
        ({"rank": 4, "init": "random"}, "goes with mapping='identity'"),
        ({"overrides": {"layers.*": {"streams": 2}}}, "sets 'streams'"),
        (
            {"overrides": {"layers.*": {"mapping": "sinkhron"}}},
            "'layers.*': option 'mapping' is 'sinkhron'; did you mean 'sinkhorn'",
        ),
        ({"overrides": ["layers"]}, "expected a dict such as"),
    ],
)
def test_wrong_options_raise_with_a_message(options, message):
    with pytest.raises(OptionError) as error:
        mhc_compile.Options.parse(options)
    assert message in str(error.value)


def test_given_options_override_the_preset():
    assert mhc_compile.Options.parse({"preset": "glm5-next"}).eps == 1e-5
    assert mhc_compile.Options.parse({"preset": "glm5-next", "eps": 1e-6}).eps == 1e-6
    assert (
        mhc_compile.Options(preset="glm5-next", mapping="identity").resolved.spec
        == "identity;pre_eps=1e-06;sinkhorn_eps=1e-06"
    )


@pytest.mark.parametrize("case", [pytest.param("deepseek-v4", marks=pytest.mark.slow), "qwen4-exp", "static"])
def test_restored_from_a_file(case, tmp_path):
    """What the names and shapes in a file tell need not be said: the learned read-out, the rank,
    static coefficients.
    """
    from safetensors.torch import save_file

    model, ids = randomised(CASES[case])
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "m.safetensors")
    fresh = Decoder(width=WIDTH).double()
    preset = CASES[case].get("preset", "paper")
    known = {"preset": preset, "init": "random"}
    mhc_compile.restore(fresh, tmp_path / "m.safetensors", options=known)
    fresh.load_state_dict(model.state_dict())
    got = torch.compile(fresh, backend="mhc", options={**CASES[case], "inner_backend": "eager", "strict": True})(ids)
    assert (got - by_hand(model, ids)).abs().max() < 1e-11


def test_pattern_that_matches_no_site_warns():
    model, ids = Decoder(width=WIDTH), tokens()
    options = {"inner_backend": "eager", "overrides": {"layers.*.mlp": {"token_dependent": False}}}
    with pytest.warns(mhc_compile.MhcWarning, match=r"'layers\.\*\.mlp' fits no site .* 'blocks\.\d\.mlp'"):
        torch.compile(model, backend="mhc", options=options)(ids)


def test_patterns_fit_the_end_of_a_path():
    options = mhc_compile.Options(
        overrides={"layers.*.mlp": {"mapping": "identity"}, "*.3.mlp": {"token_dependent": False}}
    ).resolved
    assert options.at("model.layers.3.mhc.mlp").mapping == "identity"
    assert not options.at("model.layers.3.mlp").token_dependent
    assert options.at("model.layers.2.mlp").token_dependent
    assert options.at("model.players.3.attn") is options


@pytest.mark.parametrize(
    "case", ["deepseek-v4", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "deepseek-v4")]
)
def test_an_exported_program_and_the_eager_model_compute_the_same(case):
    model, ids = randomised(CASES[case])
    want = by_hand(model, ids)
    program = mhc_compile.rewrite(torch.export.export(model, (ids,)), options=CASES[case])
    assert not any("mhc" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert (program.module()(ids) - want).abs().max() < 1e-11
    assert (mhc_compile.eager(model, options=CASES[case])(ids) - want).abs().max() < 1e-11


@pytest.mark.parametrize(
    "case",
    [
        "qwen4-exp",
        "sites",
        *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c not in ("qwen4-exp", "sites")),
    ],
)
def test_explain_counts_the_parameters_that_are_attached(case):
    model, _ = randomised(CASES[case])
    attached = sum(p.numel() for name, p in model.named_parameters() if ".mhc." in name)
    said = mhc_compile.explain(Decoder(width=WIDTH).double(), tokens(), options=CASES[case])
    assert said.cost.parameters == attached


def test_a_reader_of_a_value_that_runs_on_streams_gets_their_sum_too():
    """The norm between two adds is lifted over the streams, and what it gives is returned as
    well.
    """

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.norm, self.g = (torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))

        def forward(self, x):
            y = self.norm(x + self.f(torch.tanh(x)))
            return y + self.g(torch.tanh(y)), y

    torch.manual_seed(0)
    model, x = Normed().double(), torch.randn(2, 3, 4, dtype=torch.float64)
    options = {"read_out": "sum", "init": "random", "inner_backend": "eager", "strict": True}
    compiled = torch.compile(model, backend="mhc", options=options)
    got = compiled(x)
    first, second = (model.mhc.get(name) for name in ("f", "g"))
    with torch.no_grad(), warnings.catch_warnings():  # that branches run outside a compiled graph
        warnings.simplefilter("ignore", mhc_compile.MhcWarning)
        after = model.norm(first(x.unsqueeze(-2).expand(-1, -1, 4, -1), lambda h: model.f(torch.tanh(h))))
        assert (got[1] - after.sum(-2)).abs().max() < 1e-12
        assert (got[0] - second(after, lambda h: model.g(torch.tanh(h))).sum(-2)).abs().max() < 1e-12


def test_a_model_that_returns_its_trunk_is_whole():
    """Its chain leaves the graph as a result; that alone is no reason to believe that it goes on
    elsewhere.
    """

    class Trunk(Decoder):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return x

    class Loop(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.loss = model, torch.nn.Identity()

        def forward(self, ids):
            return self.loss(self.model(ids))

    model, ids = Trunk(width=WIDTH), tokens()
    plain = twin(model)
    compiled = torch.compile(
        model, backend="mhc", options={"read_out": "learned", "inner_backend": "eager", "strict": True}
    )
    assert (compiled(ids) - plain(ids)).abs().max() < 1e-5
    assert (Loop(compiled)(ids) - plain(ids)).abs().max() < 1e-5
    assert "blocks.1.mhc.mlp.read_out.weight" in dict(model.named_parameters())


def test_blocks_compiled_one_by_one_can_not_end_in_a_learned_way():
    model, ids = Decoder(width=WIDTH), tokens()
    for block in model.blocks:
        block.compile(backend="mhc", options={"preset": "deepseek-v4", "inner_backend": "eager"})
    with pytest.raises(AttachError, match="runs through several graphs"):
        model(ids)
