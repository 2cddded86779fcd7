"""A model with hyper-connections outside a compiled graph: the warning, and `mhc_compile.eager`."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import pytest
import torch
from helpers.builders import LAYERS, Block, Decoder, build, tokens, twin
from torch import nn
from torch.utils.checkpoint import checkpoint

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}


def scatter(model: nn.Module) -> nn.Module:
    """Hyper-connections far from their start, so that streams differ and the model is not the plain
    one.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            for name, parameter in connection.named_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) / connection.speeds.get(name, 1))
    return model


def restless(model: nn.Module) -> nn.Module:
    """With weights so large that its tokens depend on what came before."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.3)
    return model.eval()


@functools.cache
def _attached(layers: int) -> tuple[nn.Module, nn.Module]:
    model = Decoder(layers=layers)
    plain = twin(model)
    mhc_compile.attach(model, tokens())
    return scatter(model), plain


def attached(layers: int = 1) -> tuple[nn.Module, nn.Module]:
    """Return a model with hyper-connections, and the plain one."""
    model, plain = _attached(layers)
    return twin(model), twin(plain)


def told(*calls) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for call in calls:
            call()
    return [str(w.message) for w in caught if issubclass(w.category, mhc_compile.MhcWarning)]


def test_a_part_and_a_wrapper_run_the_streams():
    model, _ = attached()
    want = mhc_compile.eager(model, options=EAGER)(tokens())
    assert torch.equal(nn.Sequential(model, nn.Identity())(tokens()), want)
    x = model.embed(tokens())
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(model.head(model.norm(x)), want)


def test_compiled_calls_and_recomputation_do_not_warn():
    class Checkpointed(Decoder):
        def forward(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x))

    def step(compiled):
        compiled(tokens()).sum().backward()

    def outside():
        block = torch.compile(Block(8), backend="mhc", options=EAGER)
        checkpoint(block, torch.randn(1, 3, 8, requires_grad=True), use_reentrant=False).sum().backward()

    inside = torch.compile(Checkpointed(layers=1), backend="mhc", options=EAGER)
    assert told(lambda: step(inside), lambda: step(inside), outside) == []


def test_eager_computes_what_the_compiled_model_computes():
    model, plain = attached()
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager"})
    want = compiled(tokens())
    want.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    debug = mhc_compile.eager(compiled)
    got = debug(tokens())
    got.sum().backward()
    assert not torch.allclose(got, plain(tokens()), atol=1e-3)
    torch.testing.assert_close(got, want)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=name)


def test_eager_is_the_model_itself_but_for_the_call():
    model, plain = attached()
    debug = mhc_compile.eager(model)
    assert isinstance(debug, Decoder)
    assert debug.state_dict().keys() == model.state_dict().keys()
    assert debug.blocks is model.blocks
    debug.eval()
    assert not model.training
    model.note = "x"
    assert debug.note == "x"
    debug.extra = nn.Linear(1, 1)
    assert model.extra is debug.extra
    assert mhc_compile.connections(debug).keys() == mhc_compile.connections(model).keys()
    want = debug(tokens())
    for other in (copy.deepcopy(debug), pickle.loads(pickle.dumps(debug))):
        assert torch.equal(other(tokens()), want)
        assert other.blocks is not model.blocks
        assert told(lambda other=other: other(tokens())) == []
    assert mhc_compile.detach(debug) == 2
    assert torch.equal(model(tokens()), plain(tokens()))


def test_eager_attaches_like_the_first_compiled_call():
    model = Decoder(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    debug = mhc_compile.eager(model, options={"streams": 2})
    debug(tokens()).sum().backward()
    optimizer.step()
    assert {c.streams for c in mhc_compile.connections(model).values()} == {2}
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == listed
    with pytest.raises(mhc_compile.errors.OptionError, match="did you mean 'streams'"):
        mhc_compile.eager(model, options={"stream": 2})
    with pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten"):
        mhc_compile.eager(nn.Linear(2, 2))(torch.randn(1, 2))


def test_eager_leaves_compiled_versions_alone_and_has_no_limit_of_its_own():
    model, plain = attached()
    graphs = []

    def count(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(model, backend="mhc", options={"inner_backend": count})
    want = compiled(tokens())
    debug = mhc_compile.eager(model)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=2):
        for length in range(2, 6):  # every length another version
            assert not torch.allclose(debug(tokens(length=length)), plain(tokens(length=length)), atol=1e-3)
    assert torch.equal(compiled(tokens()), want)
    assert len(graphs) == 1


def test_eager_of_a_model_compiled_in_place():
    model, plain = attached()
    ran = []

    def counting(graph_module, inputs):
        return lambda *values: ran.append(1) or graph_module(*values)

    model.compile(backend="mhc", options={"inner_backend": counting})
    want = model(tokens())
    torch.testing.assert_close(mhc_compile.eager(model)(tokens()), want)
    assert len(ran) == 1  # the compiled version had no part in the second call
    model(tokens())
    assert len(ran) == 2
    assert not torch.allclose(want, plain(tokens()), atol=1e-3)


class Printing(Block):
    """Prints the output of its first branch in a way that torch.compile keeps in the graph."""

    def forward(self, x):
        y = self.attn(self.norm1(x))
        torch._higher_order_ops.print("branch {}", y.sum())
        x = x + y
        return x + self.mlp(self.norm2(x))


class Breaking(Printing):
    def forward(self, x):
        y = self.attn(self.norm1(x))
        print("branch", y.sum())
        x = x + y
        return x + self.mlp(self.norm2(x))


def test_print_in_a_branch(capsys):
    model, plain = attached()
    want = mhc_compile.eager(model)(tokens())
    assert not torch.allclose(want, plain(tokens()), atol=1e-3)
    model.blocks[0].__class__ = Printing
    debug = mhc_compile.eager(model)
    for _ in range(2):
        capsys.readouterr()
        assert torch.equal(debug(tokens()), want)
        assert len(capsys.readouterr().out.split("branch ")) == 2


def test_chain_continues_after_a_print():
    model, _ = attached(LAYERS)
    want = mhc_compile.eager(model)(tokens())
    model.blocks[1].__class__ = Breaking
    debug = mhc_compile.eager(model)
    assert told(lambda: debug(tokens()), lambda: debug(tokens()), lambda: debug(tokens(length=6))) == []
    torch.testing.assert_close(debug(tokens()), want)


class Opaque(Block):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


def test_unused_hyper_connections_warn():
    model, _ = attached(LAYERS)
    model.blocks[1].__class__ = Opaque
    debug = mhc_compile.eager(model)
    said = told(lambda: debug(tokens()), lambda: debug(tokens()), lambda: debug(tokens(length=6)))
    said = [message for message in said if "had no part" in message]
    assert len(said) == 1
    assert "2 of the 4 hyper-connections of Decoder had no part in this call (blocks.1.mhc.attn, ...)" in said[0]


class Singular(nn.Module):
    """A branch whose gradient is infinity times zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return (self.linear(x) * 0.0).sqrt()


def test_anomaly_mode_finds_the_operation():
    model, _ = attached()
    model.blocks[0].mlp = Singular()
    debug = mhc_compile.eager(model)
    with torch.autograd.set_detect_anomaly(True):
        loss = debug(tokens()).sum()
        with (
            pytest.warns(UserWarning, match="Error detected in MulBackward0"),
            pytest.raises(RuntimeError, match="Function 'MulBackward0' returned nan"),
        ):
            loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inner_backend"), [("gpt2", "aot_eager"), ("llama", "aot_eager"), ("llama", "inductor")]
)
def test_generate(name, inner_backend):
    case = build(name)
    model = restless(case.model)
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 30, "eos_token_id": None}
    ids = case.inputs["input_ids"][:, :4]
    plain = model.generate(ids, **options)
    mhc_compile.attach(model, **case.inputs)
    scatter(model)
    debug = mhc_compile.eager(model)
    full = debug.generate(ids, **options)
    assert not torch.equal(full, plain)
    # Written out, without a cache: the whole sequence again for every token.
    sequences, sequence = [], ids
    for _ in range(options["max_new_tokens"]):
        sequence = torch.cat([sequence, debug(sequence).logits[:, -1:].argmax(-1)], dim=1)
    sequences.append(sequence)
    model.compile(backend="mhc", options={"inner_backend": inner_backend})
    assert told(lambda: sequences.append(model.generate(ids, **options))) == []
    sequences.append(model.generate(ids, cache_implementation="static", **options))
    assert all(torch.equal(other, full) for other in sequences)


@pytest.mark.slow
def test_generate_compiled_in_place():
    """Greedy tokens of the compiled model are those of the model in eager, and not the plain
    model's.
    """
    case = build("llama")
    model = restless(case.model)
    options = {"max_new_tokens": 2, "do_sample": False, "use_cache": True, "pad_token_id": 30, "eos_token_id": None}
    ids = case.inputs["input_ids"][:, :4]
    plain = model.generate(ids, **options)
    mhc_compile.attach(model, **case.inputs)
    scatter(model)
    want = mhc_compile.eager(model).generate(ids, **options)
    assert not torch.equal(want, plain)
    model.compile(backend="mhc", options=EAGER)
    assert torch.equal(model.generate(ids, **options), want)


def test_generate_of_an_optimized_module_runs_the_streams():
    """Its `generate` is that of the model inside, which calls that model."""
    case = build("gpt2", layers=1)
    model = restless(case.model)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 30}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(case.inputs["input_ids"], **options).scores[0]
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    mhc_compile.attach(compiled, **case.inputs)
    scatter(model)
    got = compiled.generate(case.inputs["input_ids"], **options).scores[0]
    assert not torch.allclose(got, plain, atol=1e-3)
    assert torch.equal(got, mhc_compile.eager(model).generate(case.inputs["input_ids"], **options).scores[0])
