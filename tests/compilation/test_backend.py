"""`torch.compile(model, backend="mhc")`: attaching, retracing, recompiling, training, and what it
says when it cannot.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import LAYERS, Decoder, build, run, tokens, twin
from helpers.gates import scatter
from torch import nn
from torch._dynamo.utils import counters

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}


class Counting:
    """An inner compiler that keeps the graphs it is given."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, inputs):
        self.graphs.append(graph_module)
        return graph_module.forward

    def updates(self):
        return [sum(n.target is torch.ops.mhc.update.default for n in g.graph.nodes) for g in self.graphs]


def test_the_backend_is_found_by_name():
    assert "mhc" in torch.compiler.list_backends()


def test_first_call_attaches_parameters_to_the_block():
    model = Decoder()
    names = set(dict(model.named_parameters()))
    torch.compile(model, backend="mhc", options=EAGER)(tokens())
    added = set(dict(model.named_parameters())) - names
    assert added == {
        f"blocks.{layer}.mhc.{branch}.{part}"
        for layer in range(LAYERS)
        for branch in ("attn", "mlp")
        for part in ("phi", "bias", "scale")
    }
    assert added <= set(model.state_dict())


def test_the_graph_that_reaches_the_inner_compiler():
    inner_backend = Counting()
    model = Decoder()
    torch.compile(model, backend="mhc", options={"inner_backend": inner_backend})(tokens())
    assert inner_backend.updates() == [2 * LAYERS]
    called = [str(n.target) for n in inner_backend.graphs[0].graph.nodes if n.op == "call_function"]
    assert not any("declare" in target for target in called)
    inner_backend.graphs[0].graph.lint()


def test_train_eval_and_shapes_reuse_the_parameters_and_recompile_as_the_plain_model_does():
    def graphs(backend, options=None):
        torch._dynamo.reset()
        counters.clear()
        model = Decoder()
        compiled = torch.compile(model, backend=backend, options=options)
        compiled(tokens(2, 5))
        after_first = set(map(id, model.parameters()))
        counts = [counters["stats"]["unique_graphs"]]
        for batch, length in ((3, 6), (4, 7), (5, 9)):
            compiled(tokens(batch, length))
            counts.append(counters["stats"]["unique_graphs"])
        model.eval()
        compiled(tokens(3, 5))
        model.train()
        compiled(tokens(2, 5))
        counts.append(counters["stats"]["unique_graphs"])
        assert set(map(id, model.parameters())) == after_first
        return counts

    plain = graphs("eager")
    ours = graphs("mhc", EAGER)
    # The first graph of this backend is traced twice: for the sites, and with their parameters.
    assert [count - ours[0] for count in ours] == [count - plain[0] for count in plain]
    assert ours[1] == ours[2] == ours[3]  # dynamic from the second shape on


def test_a_width_that_a_norm_pins_down_is_no_dynamic_width():
    model = Decoder().blocks
    block = nn.Sequential(*model)
    torch.compile(block, backend="mhc", options={"inner_backend": "eager"}, dynamic=True)(torch.randn(2, 5, 8))
    assert len(mhc_compile.connections(block)) == 2 * len(model)


def test_dynamic_shapes_preserve_the_function():
    model = Decoder(layers=1)
    plain = twin(model)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager"}, dynamic=True)
    for batch, length in ((2, 5), (3, 7), (1, 4)):
        ids = tokens(batch, length)
        assert (compiled(ids) - plain(ids)).abs().max() < 1e-5


def test_an_empty_batch_gives_an_empty_result_and_zero_gradients():
    model = Decoder()
    out = torch.compile(model, backend="mhc", options=EAGER)(torch.zeros(0, 5, dtype=torch.long))
    assert out.shape == (0, 5, 11)
    out.sum().backward()
    assert all(not p.grad.any() for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("inner_backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_training_separates_the_streams_moves_every_parameter_and_lowers_the_loss(inner_backend):
    case = build("gpt2")
    options = {"inner_backend": inner_backend}
    compiled = torch.compile(case.model, backend="mhc", options=options)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-2)
    losses, first = [], None
    for _ in range(6):
        optimizer.zero_grad()
        loss = case.loss(compiled(**case.inputs))
        loss.backward()
        if first is None:
            first = {n: p.detach().clone() for n, p in case.model.named_parameters() if ".mhc." in n}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = {n: (p.detach() - first[n]).abs() for n, p in case.model.named_parameters() if n in first}
    assert len(moved) == 3 * 2 * LAYERS
    n = 4
    for position, (name, change) in enumerate(moved.items()):
        assert change.max() > 1e-4, name
        # At the first site the streams are copies for ever, so its H_res has no effect; everywhere
        # else its logits have moved.
        if position >= 3 and name.endswith("bias"):
            assert (change[2 * n :] > 0).all(), name
        if position >= 3 and name.endswith("phi"):
            assert (change[:, 2 * n :] > 0).any(), name
    (chain,) = mhc_compile.stability(case.model, **case.inputs, options=options).chains
    first, *others = chain.sites
    assert first.entering.distance == 0.0  # copies
    assert min(site.entering.distance for site in others) > 1e-3
    assert max(site.composite_forward for site in chain.sites) == pytest.approx(1.0, abs=1e-5)
    assert max(site.composite_backward for site in chain.sites) < 1.6


@pytest.mark.slow
def test_state_dict_goes_to_a_new_process_and_back(tmp_path):
    model = Decoder()
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    compiled(tokens())
    scatter(model, 1.0)
    logits = compiled(tokens())
    torch.save({"state": model.state_dict(), "logits": logits.detach()}, tmp_path / "model.pt")
    script = f"""
import sys, torch
sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parents[1])!r})
from helpers.builders import Decoder, tokens
import mhc_compile
saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=True)
model = Decoder()
mhc_compile.attach(model, tokens())
model.load_state_dict(saved["state"])  # strict
logits = torch.compile(model, backend="mhc", options={{"inner_backend": "eager"}})(tokens())
assert torch.equal(logits, saved["logits"]), (logits - saved["logits"]).abs().max()
print("identical")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "identical", done.stderr


@pytest.mark.parametrize(
    "settings", [{"gate_speed": 1.0}, {"iterations": 3}, {"eps": 0.01}, {"init": "random", "read_out": "sum"}]
)
def test_a_model_of_other_settings_is_compiled_by_itself(settings):
    """Dynamo would use the first model's graph, whose parameters have the same shapes."""
    base = Decoder()
    models = [twin(base), twin(base)]
    for model, own in zip(models, ({"init": settings.get("init", "preserve")}, settings), strict=True):
        mhc_compile.attach(model, tokens(), options=own)
    scatter(models[0], 1.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the same numbers: with another gate_speed they are another function
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            other.copy_(one)
    one, other = (torch.compile(model, backend="mhc", options=EAGER) for model in models)
    want = mhc_compile.plain(base)(tokens())
    first = one(tokens())
    if "read_out" in settings:
        with pytest.raises(mhc_compile.errors.AttachError, match="its hyper-connection has read_out='sum'"):
            other(tokens())
        return
    got = other(tokens())
    assert (got - models[1](tokens())).abs().max() < 1e-6  # operation by operation
    assert (got - first).abs().max() > 1e-4
    assert (got - want).abs().max() > 1e-2


def test_one_graph_for_two_models_uses_each_one_s_parameters():
    inner_backend = Counting()
    options = {"inner_backend": inner_backend}
    one = Decoder()
    mhc_compile.attach(one, tokens())
    other = twin(one)
    with torch.no_grad():
        for connection in mhc_compile.connections(other).values():
            connection.bias.normal_()
    first = torch.compile(one, backend="mhc", options=options)(tokens())
    second = torch.compile(other, backend="mhc", options=options)(tokens())
    alone = twin(other)
    torch._dynamo.reset()
    want = torch.compile(alone, backend="mhc", options=EAGER)(tokens())
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(second, want)


def test_the_model_itself_in_eval_after_training_is_not_silently_plain():
    """nn.TransformerEncoder takes a fused path in eval without gradients; with hyper-connections it
    must not.
    """
    case = build("encoder", layers=1)
    options = {"inner_backend": (inner_backend := Counting())}
    compiled = torch.compile(case.model, backend="mhc", options=options)
    case.model.eval()
    with torch.no_grad(), pytest.warns(mhc_compile.MhcWarning, match="call it once in training mode"):
        compiled(**case.inputs)
    case.model.train()
    compiled(**case.inputs)
    case.model.eval()
    with torch.no_grad():
        compiled(**case.inputs)
    assert inner_backend.updates()[-1] == 2
    assert inner_backend.updates()[0] == 0


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x):
        return self.layers(x)


def test_a_model_without_residual_adds_warns_and_runs():
    model = Stack()
    x = torch.randn(2, 4)
    with pytest.warns(
        mhc_compile.MhcWarning, match=r"no addition of floating-point tensors\. It runs as the plain model"
    ) as caught:
        out = torch.compile(model, backend="mhc", options=EAGER)(x)
    assert torch.equal(out, model(x))
    assert caught[0].filename == __file__  # the warning points at the caller


def test_a_model_without_residual_adds_is_an_error_with_strict():
    with pytest.raises(mhc_compile.errors.NothingRewrittenError, match="no addition of floating-point tensors"):
        torch.compile(Stack(), backend="mhc", options={"strict": True, **EAGER})(torch.randn(2, 4))


def test_reasons_are_counted_in_the_complaint():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(3):
                x = self.g(x + self.f(x))
            return x

    with pytest.warns(
        mhc_compile.MhcWarning, match=r"3 floating-point additions, all rejected \(3 × chain-too-short\)"
    ):
        torch.compile(Projected(), backend="mhc", options=EAGER)(torch.randn(2, 4))


def test_an_integer_model_warns():
    class Integers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.long), requires_grad=False)

        def forward(self, x):
            return x + x @ self.weight

    with pytest.warns(mhc_compile.MhcWarning, match="no addition of floating-point tensors"):
        out = torch.compile(Integers(), backend="mhc", options=EAGER)(torch.ones(2, 4, dtype=torch.long))
    assert torch.equal(out, torch.full((2, 4), 5))


def test_a_complex_model_warns_with_the_reason():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

        def forward(self, x):
            x = x + x @ self.weight
            return x + x @ self.weight

    with pytest.warns(mhc_compile.MhcWarning, match="2 × dtype"):
        torch.compile(Complex(), backend="mhc", options=EAGER)(torch.randn(2, 4, dtype=torch.complex64))


def test_other_streams_than_attached_are_an_error():
    model = Decoder()
    mhc_compile.attach(model, tokens(), options={"streams": 2})
    with pytest.raises(
        mhc_compile.errors.AttachError, match=r"blocks.0.mhc.attn: .* has streams=2, the options say streams=4"
    ):
        torch.compile(model, backend="mhc", options=EAGER)(tokens())


def test_a_module_with_an_mhc_of_its_own_is_an_error():
    model = Decoder()
    model.blocks[0].mhc = nn.Identity()
    with pytest.raises(mhc_compile.errors.AttachError, match=r"'blocks.0' already has an attribute 'mhc' \(Identity\)"):
        torch.compile(model, backend="mhc", options=EAGER)(tokens())


def test_the_backend_called_by_hand_says_what_to_call_instead():
    from mhc_compile.backend import mhc

    with pytest.raises(mhc_compile.MhcError, match=r"use mhc_compile\.rewrite"):
        mhc(torch.fx.symbolic_trace(Stack()), [])


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "encoder"])
def test_inductor_preserves_outputs_and_gradients(name):
    from helpers.builders import assert_same, without_dropout

    case = build(name, layers=1)
    case.model.train()
    plain = twin(without_dropout(case.model))
    want = run(case, plain, plain)
    got = run(case, torch.compile(case.model, backend="mhc"), case.model)
    assert len(mhc_compile.connections(case.model)) == 2
    assert_same(got, want, 1e-5)


def test_mode_and_inductor_settings_reach_inductor(monkeypatch):
    from mhc_compile import _torch

    seen = {}

    def compile_fx(module, inputs, inner_compile, config_patches=None):
        seen.update(config_patches)
        return module.forward

    monkeypatch.setattr(_torch.inductor, "compile_fx", compile_fx)
    model = Decoder()
    torch.compile(model, backend="mhc", mode="max-autotune-no-cudagraphs", options=None)(tokens())
    assert seen["max_autotune"] is True
    seen.clear()
    torch._dynamo.reset()
    torch.compile(model, backend="mhc", options={"inductor": {"epilogue_fusion": False}})(tokens())
    assert seen == {"epilogue_fusion": False}


def test_a_graph_break_around_the_loss_does_no_harm():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = Decoder()

        def forward(self, ids):
            logits = self.decoder(ids)
            torch._dynamo.graph_break()
            return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

    model = WithLoss()
    plain = twin(model)
    inner_backend = Counting()
    got = torch.compile(model, backend="mhc", options={"inner_backend": inner_backend})(tokens())
    assert sorted(inner_backend.updates()) == [0, 2 * LAYERS]
    assert torch.allclose(got, plain(tokens()), atol=1e-6)


@pytest.mark.slow
def test_a_second_process_finds_the_compiled_graphs_in_inductor_s_cache(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parents[1])!r})
import torch
from helpers.builders import Decoder, tokens
from torch._dynamo.utils import counters
torch.manual_seed(0)
torch.compile(Decoder(layers=1), backend="mhc")(tokens()).sum().backward()
print(counters["inductor"]["fxgraph_cache_bypass"], counters["inductor"]["fxgraph_cache_hit"])
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    seen = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.split())
    assert [bypassed for bypassed, _ in seen] == ["0", "0"]
    assert seen[0][1] == "0"
    assert int(seen[1][1]) > 0


@pytest.mark.slow
def test_a_change_of_our_operators_changes_the_key_of_the_caches(monkeypatch):
    from mhc_compile import _torch, ops
    from mhc_compile.compilation import inner_compiler

    tags = []

    def compile_fx(module, inputs, inner_compile, config_patches=None):
        tags.append(torch.compiler.config.cache_key_tag)
        return module.forward

    monkeypatch.setattr(_torch.inductor, "compile_fx", compile_fx)
    prints = (("one", "cheap", "p"), ("other", "cheap", "p"), ("other", "block", "p"), ("other", "block", "q"))
    for print_of, recompute, passes in prints:
        monkeypatch.setattr(ops, "fingerprint", lambda print_of=print_of: print_of)
        monkeypatch.setattr(inner_compiler, "_joint_passes", lambda passes=passes: passes)
        torch._dynamo.reset()
        torch.compile(Decoder(), backend="mhc", options={"recompute": recompute})(tokens())
    assert tags == ["mhc-one-cheap-p", "mhc-other-cheap-p", "mhc-other-block-p", "mhc-other-block-q"]
    assert torch.compiler.config.cache_key_tag == ""


def test_the_key_of_a_backward_depends_on_our_operators_too(monkeypatch):
    """It is compiled when it is first called, long after the forward."""
    from mhc_compile import ops
    from mhc_compile._torch import inductor

    tags, mark = {}, uuid.uuid4().hex  # which no cache holds
    compile_fx_inner = inductor.compile_fx_inner

    def inner(*args, is_backward=False, **kwargs):
        tags[is_backward] = torch.compiler.config.cache_key_tag
        return compile_fx_inner(*args, is_backward=is_backward, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx_inner", inner)
    monkeypatch.setattr(ops, "fingerprint", lambda: mark)
    loss = torch.compile(Decoder(layers=1), backend="mhc")(tokens()).sum()
    assert torch.compiler.config.cache_key_tag == ""
    loss.backward()
    assert set(tags) == {False, True}
    assert all(tag.startswith(f"mhc-{mark}-") for tag in tags.values())
