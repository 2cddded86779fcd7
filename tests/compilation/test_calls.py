"""Every way to call a model with hyper-connections computes them: other compilers, transforms,
tracers, modes, copies and parts. Compared with mHC written by hand, at stirred parameters.
"""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from helpers.builders import Pair
from helpers.hand_written import Transformer, stir, transformer_by_hand, values_of
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import mhc_compile

EAGER = {"inner_backend": "eager"}
STRICT = {**EAGER, "strict": True}
TOKENS = torch.arange(10).reshape(2, 5) % 7


def attached(seed: int = 0, **options) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(layers=2)
    mhc_compile.attach(model, TOKENS, options={**EAGER, **options})
    stir(model, torch.Generator().manual_seed(seed))
    return model


def by_hand(model, tokens=TOKENS, *, plain: bool = False):
    return transformer_by_hand(values_of(model), tokens, model.gain, plain=plain)


def assert_equal(out, want):
    assert (out.double() - want).abs().max() <= 1e-5 * want.abs().max()


def mode(call):
    with FlopCounterMode(display=False) as counter:
        out = call()
    assert counter.get_total_flops() > 0
    return out


def stance(call):
    with torch.compiler.set_stance("force_eager"):
        return call()


def loop(model, tokens):
    """The model's forward, written by its user."""
    x = model.embed(tokens)
    for block in model.blocks:
        x = block(x)
    return model.head(x)


WAYS = {
    "itself": lambda model: model(TOKENS),
    "forward as a method": lambda model: Transformer.__call__(model, TOKENS),
    "no_grad": torch.no_grad()(lambda model: model(TOKENS)),
    "inference_mode": torch.inference_mode()(lambda model: model(TOKENS)),
    "aot_eager": lambda model: torch.compile(model, backend="aot_eager")(TOKENS),
    "a function around it": lambda model: torch.compile(lambda t: model(t) * 1, backend="eager", fullgraph=True)(
        TOKENS
    ),
    "compiled in place by another": lambda model: (model.compile(backend="eager"), model(TOKENS))[1],
    "compiled in place": lambda model: (model.compile(backend="mhc", options=EAGER), model(TOKENS))[1],
    "copy": lambda model: copy.deepcopy(model)(TOKENS),
    "copy of a model compiled in place": lambda model: (
        model.compile(backend="mhc", options=EAGER),
        copy.deepcopy(model)(TOKENS),
    )[1],
    "force_eager": lambda model: stance(lambda: model(TOKENS)),
    "force_eager, compiled": lambda model: stance(lambda: torch.compile(model, backend="mhc")(TOKENS)),
    "disabled around it": lambda model: torch.compiler.disable(lambda: model(TOKENS))(),
    "its blocks": lambda model: loop(model, TOKENS),
    "functional_call": lambda model: functional_call(model, dict(model.named_parameters()), (TOKENS,)),
    "vmap": lambda model: vmap(lambda t: model(t.unsqueeze(0)).squeeze(0))(TOKENS),
    "vmap, compiled inside": lambda model: vmap(
        lambda t: torch.compile(model, backend="mhc", options=EAGER)(t.unsqueeze(0)).squeeze(0)
    )(TOKENS),
    "vmap, compiled outside": lambda model: torch.compile(
        lambda: vmap(lambda t: model(t.unsqueeze(0)).squeeze(0))(TOKENS), backend="mhc", options=EAGER
    )(),
    "make_fx": lambda model: make_fx(lambda t: model(t))(TOKENS)(TOKENS),
    "make_fx, symbolic": lambda model: make_fx(
        lambda t: model(t), tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(TOKENS[:, :4].clone())(TOKENS),
    "jit.trace": lambda model: torch.jit.trace(model, (TOKENS,))(TOKENS),
    "a dispatch mode": lambda model: mode(lambda: model(TOKENS)),
    "export": lambda model: torch.export.export(model, (TOKENS,)).module()(TOKENS),
    "export of a compiled model": lambda model: torch.export.export(
        torch.compile(model, backend="mhc", options=EAGER), (TOKENS,)
    ).module()(TOKENS),
    "export, strict, dynamic": lambda model: torch.export.export(
        model, (TOKENS[:, :4].clone(),), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},), strict=True
    ).module()(TOKENS),
}
#: What the default run leaves to the slow one.
SLOW = set(WAYS) - {"itself", "aot_eager", "its blocks", "vmap", "export", "copy"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*performance drop.*")
@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way in SLOW else ()) for way in WAYS])
def test_computes_its_hyper_connections(way):
    model = attached()
    want = by_hand(model)
    assert (want - by_hand(model, plain=True)).abs().max() > 0.01
    assert_equal(WAYS[way](model), want)


def test_unpickled():
    model = attached()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_equal(torch.load(file, weights_only=False)(TOKENS), by_hand(model))


def test_functional_call_with_other_values_and_their_gradients():
    """Tensors in the place of parameters, as an average of weights or a meta-learner has them."""
    model, other = attached(0), attached(1)
    values = {name: value.detach() for name, value in other.named_parameters()}
    assert_equal(functional_call(model, values, (TOKENS,)), by_hand(other))

    def loss(values):
        return functional_call(model, values, (TOKENS,)).square().mean()

    leaves = values_of(other)
    transformer_by_hand(leaves, TOKENS, 1.0).square().mean().backward()
    got = grad(loss)(values)
    for name in ("blocks.0.attn.q.weight", "blocks.1.mhc.mlp.phi", "blocks.0.mhc.attn.bias"):
        assert_equal(got[name], leaves[name].grad)
    assert_equal(model(TOKENS), by_hand(model))


@pytest.mark.slow
def test_transforms_that_are_compiled():
    """Dynamo does not trace hyper-connections under a transform: the model is called outside."""
    model, other = attached(0), attached(1)
    values = {name: value.detach() for name, value in other.named_parameters()}
    call = torch.compile(lambda p, t: functional_call(model, p, (t,)), backend="mhc", options=EAGER)
    assert_equal(call(values, TOKENS), by_hand(other))
    leaves = values_of(other)
    transformer_by_hand(leaves, TOKENS, 1.0).square().mean().backward()
    compiled = torch.compile(
        lambda p: grad(lambda p: functional_call(model, p, (TOKENS,)).square().mean())(p), backend="mhc", options=EAGER
    )
    got = compiled(values)
    assert_equal(got["blocks.1.mhc.mlp.phi"], leaves["blocks.1.mhc.mlp.phi"].grad)


@pytest.mark.slow
def test_an_ensemble_and_a_jacobian():
    models = [attached(seed) for seed in range(3)]
    stacked = stack_module_state(models)
    outs = vmap(lambda p, b: functional_call(models[0], (p, b), (TOKENS,)))(*stacked)
    for out, model in zip(outs, models, strict=True):
        assert_equal(out, by_hand(model))
    model, x = models[0], torch.randn(1, 3, 8)
    block = model.blocks[0]
    got = jacrev(lambda x: block(x))(x)
    want = torch.autograd.functional.jacobian(lambda x: block(x), x)
    assert_equal(got, want.double())


def test_plain_shares_parameters_and_computes_plain_adds():
    model = attached()
    plain = mhc_compile.plain(model)
    assert_equal(plain(TOKENS), by_hand(model, plain=True))
    assert_equal(torch.compile(plain, backend="eager")(TOKENS), by_hand(model, plain=True))
    assert not mhc_compile.connections(plain)
    assert plain.state_dict().keys() == Transformer(layers=2).state_dict().keys()
    assert plain.head.weight is model.head.weight
    assert len(mhc_compile.connections(model)) == 4
    assert_equal(model(TOKENS), by_hand(model))


def test_training_outside_a_graph_trains_every_hyper_connection():
    model = attached()
    leaves = values_of(model)
    transformer_by_hand(leaves, TOKENS, 1.0).square().mean().backward()
    model(TOKENS).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, leaves[name].grad)


def test_a_model_that_is_called_outside_can_be_an_error():
    model = attached(outside_calls="error")
    with pytest.raises(mhc_compile.MhcError, match=r"outside torch\.compile, and outside_calls='error'"):
        model(TOKENS)
    assert_equal(torch.compile(model, backend="mhc", options=EAGER)(TOKENS), by_hand(model))
    assert_equal(mhc_compile.eager(model)(TOKENS), by_hand(model))
    assert_equal(mhc_compile.plain(model)(TOKENS), by_hand(model, plain=True))


class Tasks(Pair):
    """A version for each task; the residual adds are in the frame that meets the limit."""

    task = "1"

    def forward(self, x):
        return super().forward(x) * int(self.task)


def test_beyond_the_recompile_limit():
    torch.manual_seed(0)
    model, x = Tasks(8), torch.randn(2, 8)
    mhc_compile.attach(model, x, options=STRICT)
    stir(model, torch.Generator().manual_seed(0))
    want = mhc_compile.eager(model)(x).detach().double()
    assert (want - mhc_compile.plain(model)(x)).abs().max() > 0.01
    compiled = torch.compile(model, backend="mhc", options=STRICT)
    with torch._dynamo.config.patch(recompile_limit=2):
        for task in range(1, 5):
            model.task = str(task)
            assert_equal(compiled(x), want * task)


def untraced(**options) -> Transformer:
    model = attached(**options)
    model.blocks[0].forward = torch.compiler.disable(model.blocks[0].forward)
    return model


def test_a_block_that_is_not_traced_is_reported_once_for_each_cause():
    model = untraced()
    with pytest.warns(
        mhc_compile.MhcWarning, match=r"residual adds of Transformer ran as plain adds.* in Block: Dynamo"
    ):
        model(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TOKENS)
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.warns(mhc_compile.MhcWarning, match="torch.compile is switched off"),
    ):
        model(TOKENS)
    with pytest.raises(mhc_compile.MhcError, match="ran as plain adds"):
        untraced(strict=True)(TOKENS)


def test_detached_it_is_the_plain_model_again():
    model = attached()
    plain = by_hand(model, plain=True)
    mhc_compile.detach(model)
    assert_equal(model(TOKENS), plain)
    assert_equal(torch.compile(model, backend="eager")(TOKENS), plain)
    model = attached()
    model.compile(backend="eager")
    mhc_compile.detach(model)
    assert model._compiled_call_impl is not None
    assert_equal(model(TOKENS), by_hand(model))


class Cut(Transformer):
    """Dynamo runs a frame as it was written if a graph breaks inside its loop."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block.attn(block.norm1(x))
            torch._dynamo.graph_break()
            x = x + block.mlp(block.norm2(x))
        return self.head(x)


def test_a_loop_that_dynamo_does_not_cut_is_reported():
    model, strict = Cut(layers=2), Cut(layers=2)
    mhc_compile.restore(model, attached().state_dict(), options=EAGER)
    mhc_compile.restore(strict, attached().state_dict(), options={**EAGER, "strict": True})
    with pytest.warns(mhc_compile.MhcWarning, match="residual adds of Cut ran as plain adds"):
        model(TOKENS)
    with pytest.raises(mhc_compile.MhcError, match="residual adds of Cut ran as plain adds"):
        strict(TOKENS)


def test_a_forward_that_is_called_directly():
    """The model's own is no call of it, but its blocks are called; a block's has the adds in it."""
    model = attached()
    assert_equal(model.forward(TOKENS), by_hand(model))
    x = model.embed(TOKENS)
    with pytest.warns(mhc_compile.MhcWarning, match=r"in Block: its code was called directly, as Block\.forward"):
        model.blocks[0].forward(x)
    with pytest.raises(mhc_compile.MhcError, match="called directly"):
        attached(strict=True).blocks[0].forward(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.blocks[0].attn(x)  # without an add


def test_a_class_of_code_without_a_module():
    """`exec` in a namespace without `__name__`, as `runpy` and notebooks may run code."""
    namespace = {"Pair": Pair}
    exec("class Own(Pair):\n    def forward(self, x):\n        return super(Own, self).forward(x)", namespace)
    model, x = namespace["Own"](8), torch.randn(3, 8)
    assert type(model).forward.__module__ is None
    mhc_compile.attach(model, x, options=EAGER)
    assert len(mhc_compile.connections(model)) == 2
    assert torch.allclose(model(x), mhc_compile.plain(model)(x), atol=1e-6)  # at their start
