"""Modules may have any name without dots; graphs and their drawings bear it."""

from __future__ import annotations

import torch
from helpers.builders import Pair, points, relative
from torch import nn

import mhc_compile

SITES = ("mhc.a-b </script>", "1.mhc.first", "1.mhc.second")


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("a-b </script>", nn.Linear(3, 3))
        self.add_module("1", Pair(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.children()
        return second(x + first(x))


def sites(diff):
    [graph] = diff.graphs
    return tuple(site.path for chain in graph.chains for site in chain.sites)


def test_a_model_with_odd_names():
    assert sites(mhc_compile.diff(Odd().eval(), points())) == SITES


def test_a_program_with_odd_names():
    program = torch.export.export(Odd().eval(), (points(),))
    assert sites(mhc_compile.diff(program)) == SITES
    rewritten = mhc_compile.rewrite(program)
    assert {f"{site}.phi" for site in SITES} <= set(rewritten.state_dict)
    assert relative(rewritten.module()(points()), program.module()(points())) < 1e-5
