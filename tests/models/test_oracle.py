"""The rewritten model against an mHC transformer written by hand, in float64, from the equations,
with none of the package's code.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import LAYERS, Decoder, tokens, twin
from helpers.gates import scatter
from helpers.hand_written import site_by_hand
from torch import Tensor

import mhc_compile
from mhc_compile.tools.zoo.families.nanochat import Nanochat

PARTS = ("phi", "bias", "scale")


def by_hand(model: Decoder, ids: Tensor, parameters: dict[str, Tensor], n: int, iterations: int, eps: float) -> Tensor:
    def site(X: Tensor, name: str, f) -> Tensor:
        return site_by_hand(X, [parameters[f"{name}.{part}"] for part in PARTS], f, n, iterations, eps)

    x = model.embed(ids)
    X = torch.stack([x] * n, dim=-2)
    for number, block in enumerate(model.blocks):
        X = site(X, f"blocks.{number}.mhc.attn", lambda h, block=block: block.attn(block.norm1(h)))
        X = site(X, f"blocks.{number}.mhc.mlp", lambda h, block=block: block.mlp(block.norm2(h)))
    return model.head(model.norm(X.mean(-2)))


@pytest.mark.parametrize(
    ("inner_backend", "streams", "iterations"),
    [
        ("eager", 4, 5),
        *(pytest.param("eager", *sizes, marks=pytest.mark.slow) for sizes in ((4, 20), (3, 5), (1, 20))),
        ("aot_eager", 4, 20),
        ("inductor", 4, 20),
    ],
)
def test_forward_and_every_gradient_equal_the_equations(inner_backend, streams, iterations):
    layers = 1 if inner_backend == "inductor" else LAYERS
    plain, model, ids = pair(layers)
    options = {"streams": streams, "iterations": iterations, "inner_backend": inner_backend}
    mhc_compile.attach(model, ids, options=options)
    randomise(model)
    named = leaves(plain, model)
    weight = torch.randn(2, 5, 11, dtype=torch.float64)

    want = by_hand(plain, ids, named, streams, iterations, 1e-6)
    (want * weight).sum().backward()
    got = torch.compile(model, backend="mhc", options=options)(ids)
    (got * weight).sum().backward()

    assert (got - want).abs().max() < 1e-9
    parameters = dict(model.named_parameters())
    assert parameters.keys() == named.keys()
    assert sum("mhc" in name for name in named) == 3 * 2 * layers
    for name, leaf in named.items():
        error = (parameters[name].grad - leaf.grad).abs().max()
        assert error < 1e-9 * max(1.0, leaf.grad.abs().max().item()), name


def test_the_oracle_can_fail():
    """The oracle sees a transposed H_res, the mistake that public implementations made."""
    plain, model, ids = pair()
    mhc_compile.attach(model, ids)
    randomise(model)
    named, n = leaves(plain, model), 4
    transposed = dict(named)
    for name, value in named.items():
        if name.endswith(("mhc.mlp.bias", "mhc.mlp.phi")):
            head, tail = value[..., : 2 * n], value[..., 2 * n :]
            transposed[name] = torch.cat([head, tail.unflatten(-1, (n, n)).transpose(-1, -2).flatten(-2)], dim=-1)
    got = torch.compile(model, backend="mhc", options={"inner_backend": "eager"})(ids)
    assert (got - by_hand(plain, ids, named, n, 20, 1e-6)).abs().max() < 1e-9
    assert (got - by_hand(plain, ids, transposed, n, 20, 1e-6)).abs().max() > 1e-3


@pytest.mark.parametrize("decoding", [False, True])
def test_nanochat_with_its_sums_that_are_no_sites_equals_the_equations(decoding):
    torch.manual_seed(0)
    layers, n = 3, 4
    plain = Nanochat(layers).double().eval()
    model = twin(plain)
    ids = torch.randint(0, 31, (2, 1 if decoding else 5))
    before = (torch.randn(2, 1, 16, dtype=torch.float64),) if decoding else ()
    mhc_compile.attach(model, ids, *before, options={"inner_backend": "eager"})
    randomise(model)
    connections = mhc_compile.connections(model)
    assert set(connections) == {f"mhc.{kind}.{layer}" for layer in range(layers) for kind in ("attn", "mlps")}

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (16,))

    def site(X: Tensor, name: str, f) -> Tensor:
        return site_by_hand(X, [getattr(connections[name], part) for part in PARTS], f, n, 20, 1e-6)

    with torch.no_grad():
        x = norm(plain.embed(ids))
        gate = plain.smear * torch.sigmoid(plain.gate(x[..., :4]))
        x = x + gate * (before[0] if decoding else F.pad(x, (0, 0, 1, -1)))
        X, middle = torch.stack([x] * n, dim=-2), x
        for layer in range(layers):
            extra = plain.values[layer](ids)
            X = plain.kept[layer] * X + plain.first[layer] * x[..., None, :]
            X = site(X, f"mhc.attn.{layer}", lambda h, layer=layer, extra=extra: plain.attn[layer](norm(h), extra))
            X = site(X, f"mhc.mlps.{layer}", lambda h, layer=layer: plain.mlps[layer](norm(h)))
            middle = X.mean(-2) if layer == layers // 2 else middle
        want = plain.head(norm(X.mean(-2) - plain.back * middle))
        got = torch.compile(model, backend="mhc", options={"inner_backend": "eager"})(ids, *before)
    assert (got - want).abs().max() < 1e-9


def pair(layers: int = LAYERS) -> tuple[Decoder, Decoder, Tensor]:
    plain = Decoder(width=6, layers=layers).double()
    return plain, twin(plain), tokens()


def randomise(model: Decoder) -> None:
    scatter(model, 1.0)


def leaves(plain: Decoder, model: Decoder) -> dict[str, Tensor]:
    """The parameters that the hand-written model computes with: the plain model's own, and copies
    of the hyper-connections'.
    """
    own = dict(plain.named_parameters())
    return {name: own.get(name, p.detach().clone().requires_grad_()) for name, p in model.named_parameters()}
