"""A mapping of one's own: ten lines that everything else takes as it takes its own."""

from __future__ import annotations

import types

import pytest
import torch
from helpers.builders import Decoder, distance, tokens, twin
from torch import nn

import mhc_compile
from mhc_compile import Options, ResidualMapping, mappings, ops, register_mapping
from mhc_compile.config import coefficient_spec as convention
from mhc_compile.errors import OptionError
from mhc_compile.mappings.sinkhorn import Sinkhorn


class Circulant(ResidualMapping):
    name = "circulant"

    def logits(self, n):
        return n

    def init_preserve(self, n):
        return 4.0 * (torch.arange(n) == 0)

    def matrix(self, logits, n, iterations):
        weights = torch.softmax(logits, -1)
        return torch.stack([weights.roll(i, -1) for i in range(n)], -2)


@pytest.fixture(autouse=True)
def _forget():
    before, names = dict(mappings.MAPPINGS), dict(convention.STREAM_COUNTS)
    yield
    mappings.MAPPINGS.clear()
    mappings.MAPPINGS.update(before)
    convention.STREAM_COUNTS.clear()
    convention.STREAM_COUNTS.update(names)


def variant(**members):
    return type("Variant", (Circulant,), {"name": "variant", **members})()


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_model_starts_as_it_was_and_its_gradients_are_exact(inner_backend):
    register_mapping(Circulant())
    torch.manual_seed(0)
    plain = Decoder(layers=1)
    model = twin(plain)
    compiled = torch.compile(model, backend="mhc", options={"mapping": "circulant", "inner_backend": inner_backend})
    want, got = plain(tokens()), compiled(tokens())
    assert distance(got, want) < 1e-5
    connection = mhc_compile.connections(model)["blocks.0.mhc.attn"]
    assert connection.phi.shape == (4 * 8, 2 * 4 + 4)
    with torch.no_grad():
        for each in mhc_compile.connections(model).values():
            each.bias.add_(torch.randn_like(each.bias))
    compiled(tokens()).square().sum().backward()
    for at in (0, 5, 8, 10):
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                connection.bias[at] += step
                losses.append(compiled(tokens()).double().square().sum().item())
                connection.bias[at] -= step
        assert connection.bias.grad[at].item() == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=2e-2, abs=2e-2)


def test_its_default_backward_is_exact_in_the_kernel_of_the_operator():
    register_mapping(Circulant())
    n, width = 3, 2
    shapes = ((2, n, width), (n * width, 3 * n), (3 * n,), (3,))
    tensors = tuple(torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    assert torch.autograd.gradcheck(
        lambda *values: torch.ops.mhc.coefficients(*values, "circulant", 20, 1e-6)[:3], tensors
    )
    given = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    torch.library.opcheck(torch.ops.mhc.coefficients.default, (*given, "circulant", 20, 1e-6))


def test_an_exported_program_holds_nothing_but_aten():
    register_mapping(Circulant())

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + self.f(x)
            return x + self.g(x)

    x = torch.randn(2, 3, 4)
    program = mhc_compile.rewrite(torch.export.export(Two(), (x,)), options={"mapping": "circulant"})
    assert not any("mhc" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert program.module()(x).shape == x.shape


def test_options_and_checkpoints_know_it():
    with pytest.raises(OptionError, match="option 'mapping' is 'circulant'"):
        Options(mapping="circulant")
    register_mapping(Circulant())
    with pytest.raises(OptionError, match="'circulnt'; did you mean 'circulant'"):
        Options(mapping="circulnt")
    model = Decoder(layers=1)
    mhc_compile.attach(model, tokens(), options={"mapping": "circulant", "streams": 3})
    restored = mhc_compile.restore(Decoder(layers=1), model.state_dict())
    assert {(each.mapping, each.streams) for each in restored.values()} == {("circulant", 3)}


def test_compiled_graphs_are_cached_under_its_code():
    plain = ops.fingerprint()
    register_mapping(Circulant())
    with_it = ops.fingerprint()
    assert plain != with_it == ops.fingerprint()
    register_mapping(Circulant())
    assert ops.fingerprint() == with_it
    again = Circulant()
    again.temperature = torch.tensor(2.0)
    register_mapping(again)
    assert ops.fingerprint() != with_it


def cell(source):
    """What a cell of a notebook leaves behind: a class whose module has no file."""
    module = types.ModuleType("cell")
    exec(f"from mhc_compile import ResidualMapping\nimport torch\n{source}", module.__dict__)
    return module


CELL = """
def weights(logits):
    return torch.softmax({factor} * logits, -1)

class FromACell(ResidualMapping):
    name = "from-a-cell"

    def logits(self, n):
        return n

    def init_preserve(self, n):
        return 4.0 * (torch.arange(n) == 0)

    def matrix(self, logits, n, iterations):
        return torch.stack([weights(logits).roll(i, -1) for i in range(n)], -2)
"""


def test_a_cell_that_runs_again_takes_the_place_of_its_earlier_version():
    marks = []
    for factor in (1.0, 1.0, 2.0):
        register_mapping(cell(CELL.format(factor=factor)).FromACell())
        marks.append(ops.fingerprint())
    assert marks[0] == marks[1] != marks[2]  # the function that `matrix` calls counts too


REFUSED = [
    (lambda: Circulant, "takes an object of a subclass of mhc_compile.ResidualMapping"),
    (lambda: variant(name="a;b"), "name is 'a;b'; expected a word"),
    (lambda: variant(name="sinkhorn"), "mapping 'sinkhorn' is taken by mhc_compile.mappings.sinkhorn.Sinkhorn"),
    (lambda: variant(name="circulant"), "mapping 'circulant' is taken by .*Circulant; give .*Variant another name"),
    (lambda: variant(logits=lambda self, n: 2.5), r"1 streams: logits\(n\) is 2.5"),
    (
        lambda: variant(init_preserve=lambda self, n: torch.zeros(7)),
        r"init_preserve\(n\) is \[7\]; expected a tensor \[1\]",
    ),
    (lambda: variant(init_random=lambda self, n: None), r"init_random\(n\) is None; expected a tensor \[1\]"),
    (lambda: variant(matrix=lambda self, z, n, i: z), r"is \[2, 3, 1\]; expected \[2, 3, 1, 1\]"),
    (lambda: variant(matrix=lambda self, z, n, i: 2 * Circulant.matrix(self, z, n, i)), r"sum to \[2.0\]; expected 1"),
    (lambda: variant(backward=lambda self, g, z, n, i: torch.ones_like(z)), "backward is not the gradient of matrix"),
    (lambda: variant(backward=lambda self, g, z, n, i: z[0, 0, 0, 0]), "backward failed: too many indices"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_inconsistent_mapping_is_rejected_with_a_message(make, words):
    register_mapping(Circulant())
    before = dict(mappings.MAPPINGS)
    with pytest.raises(OptionError, match=words):
        register_mapping(make())
    assert before == mappings.MAPPINGS


def test_a_changed_matrix_under_an_inherited_backward_is_noticed():
    class Warm(Sinkhorn):
        name = "warm"

        def matrix(self, logits, n, iterations):
            return super().matrix(0.5 * logits, n, iterations)

    with pytest.raises(OptionError, match=r"4 streams: backward is not the gradient .*override `backward`"):
        register_mapping(Warm())
    Warm.backward = ResidualMapping.backward
    register_mapping(Warm())


def test_one_that_has_no_number_of_streams_is_rejected():
    def check(self, n):
        raise self.reject(n, "none")

    with pytest.raises(OptionError, match="rejects every number of streams from 1 to 8"):
        register_mapping(variant(check=check))
