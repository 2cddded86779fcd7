"""Parts that are compiled one by one: a part without residual adds is no model without them."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import Pair, Small, points, twin
from torch import nn

import mhc_compile
from mhc_compile.errors import NothingRewrittenError


class Straight(nn.Sequential):
    """A block without a residual add."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.Tanh())


def compile_parts(model: nn.Module, names: tuple[str, ...], **options) -> nn.Module:
    for name in names:
        part = torch.compile(getattr(model, name), backend="mhc", options={"inner_backend": "eager", **options})
        setattr(model, name, part)
    return model


@pytest.mark.parametrize("strict", [False, True])
def test_projections_around_compiled_blocks_need_no_sites(strict):
    """The projection inwards runs before any block has hyper-connections. Warnings are errors."""
    model, x = Small(), points()
    want = twin(model)(x)
    compile_parts(model, ("inwards", "pair", "outwards"), strict=strict)
    assert torch.allclose(model(x), want, atol=1e-6)
    assert len(mhc_compile.connections(model)) == 2


def test_blocks_compiled_in_place_need_no_sites_around_them():
    model = Small()
    for part in (model.inwards, model.pair, model.outwards):
        part.compile(backend="mhc", options={"inner_backend": "eager"})
    model(points())
    assert len(mhc_compile.connections(model)) == 2


def test_parts_of_a_model_without_sites_warn_when_the_last_is_compiled():
    model = Small()
    model.pair = Straight(8)
    compile_parts(model, ("inwards", "pair"))
    with pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten"):
        model(points())
    torch._dynamo.reset()
    other = Small()
    other.pair = Straight(8)
    compile_parts(other, ("inwards", "pair"), strict=True)
    with pytest.raises(NothingRewrittenError):
        other(points())


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.MSELoss()

    def forward(self, x):
        return self.loss(self.model(x), x)


@pytest.mark.parametrize("around", [False, True], ids=["alone", "in a wrapper"])
def test_a_whole_model_without_sites_warns(around):
    model = nn.Sequential(nn.Linear(3, 8), Straight(8), nn.Linear(8, 3))
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "eager"})
    with pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten"):
        (Around(compiled) if around else compiled)(points())


@pytest.mark.slow
def test_regions_of_accelerate():
    from accelerate.utils import compile_regions

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Linear(3, 8), nn.ModuleList(Pair(8) for _ in range(3))
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    model, x = Deep(), points()
    want = twin(model)(x)
    got = compile_regions(model, backend="mhc", options={"inner_backend": "eager", "strict": True})(x)
    assert torch.allclose(got, want, atol=1e-6)
    assert len(mhc_compile.connections(model)) == 6
