"""The estimated overhead of a step, compared with counts by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile.inspection.cost import Work
from mhc_compile.inspection.roofline import MACHINES, Machine

TOKENS, C, H, N = 6, 8, 16, 4


class Block(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C) if norm else nn.Identity()
        self.up, self.down = nn.Linear(C, H), nn.Linear(H, C)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def explained(*blocks, **options):
    return mhc_compile.explain(nn.Sequential(*blocks), torch.randn(2, TOKENS // 2, C), options=options)


def test_a_plain_mlp_by_hand():
    up, relu, down, add = C + H, 2 * H, H + C, 3 * C  # elements a token: what each reads and writes
    assert explained(Block(), Block()).plain == Work(
        flops=2 * 2 * (2 * TOKENS * C * H),
        activations=2 * TOKENS * (up + relu + down + add),
        weights=2 * (C * H + H + H * C + C),
    )


def test_a_norm_is_in_the_kernel_of_the_add_before_it():
    plain, normed = explained(Block(), Block()).plain, explained(Block(norm=True), Block(norm=True)).plain
    first = 2 * C  # reads the input and writes what the product reads
    second = C  # behind the first add, whose value is at hand: writes what the product reads
    assert normed.activations - plain.activations == TOKENS * (first + second)
    assert normed.weights - plain.weights == 2 * 2 * C


def test_bytes_and_flops_of_a_site_by_hand():
    explanation = explained(Block(), Block(), streams=N, mapping="sinkhorn", iterations=20)
    k = 2 * N + N * N
    flops = 2 * N * C * k + 6 * N * C + 2 * N * N * C + 4 * N * N * 20
    parameters = N * C * k + k + 3
    assert explanation.added == Work(2 * TOKENS * flops, 2 * TOKENS * (5 * N + 2 - 3) * C, 2 * parameters)
    assert explanation.floor == Work(2 * TOKENS * flops, 2 * TOKENS * (2 * N + 2 - 3) * C, 2 * parameters)


def test_a_table_is_read_at_the_rows_that_are_looked_up():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.blocks = nn.Embedding(1000, C), nn.Sequential(Block(), Block())

        def forward(self, ids):
            return self.blocks(self.table(ids))

    plain = mhc_compile.explain(Embedded(), torch.zeros(2, TOKENS // 2, dtype=torch.long)).plain
    alone = explained(Block(), Block()).plain
    assert plain.weights == alone.weights
    assert plain.activations - alone.activations == 2 * TOKENS * C  # reads a row, writes it


def test_views_move_nothing():
    class Turned(Block):
        def forward(self, x):
            return x + self.down(torch.relu(self.up(x).transpose(0, 1).transpose(0, 1)))

    assert explained(Turned(), Turned()).plain == explained(Block(), Block()).plain


def test_shares_are_those_of_the_formula():
    explanation = explained(Block(), Block())
    plain, added, floor = explanation.plain, explanation.added, explanation.floor

    def time(work, weights):
        return work.flops / machine.flops + 2 * (work.activations + weights * work.weights) / machine.bandwidth

    for overhead in explanation.overheads[2:]:
        machine = overhead.machine
        assert overhead.here == pytest.approx(time(added, 1) / time(plain, 1))
        assert overhead.many_tokens == pytest.approx(time(added, 0) / time(plain, 0))
        assert overhead.floor == pytest.approx(time(floor, 0) / time(plain, 0))
        assert overhead.floor < overhead.many_tokens
    arithmetic, memory = explanation.overheads[:2]
    assert arithmetic.here == pytest.approx(added.flops / plain.flops)
    assert memory.many_tokens == pytest.approx(added.activations / plain.activations)


def test_every_machine_between_the_bounds_says_where_its_figures_are_from():
    for machine in MACHINES[2:]:
        assert "data sheet" in machine.source
        assert machine.flops / machine.bandwidth > 50  # per byte: FLOP/s and B/s have not changed places
    assert Machine("m", "float32", 4, 10.0, 8.0, "").seconds(Work(20, 3, 1)) == 2 + 2


def test_a_program_is_explained_as_its_model_is():
    blocks = nn.Sequential(Block(norm=True), Block(norm=True))
    inputs = (torch.randn(2, TOKENS // 2, C),)
    model = mhc_compile.explain(blocks, *inputs)
    program = mhc_compile.explain(torch.export.export(blocks, inputs))
    assert program.sites == model.sites
    assert (program.model, program.cost, program.parameters) == (model.model, model.cost, model.parameters)
    assert (program.plain, program.added, program.floor) == (model.plain, model.added, model.floor)
    assert all("test_roofline.py:" in site.source for site in program.sites)
    json.dumps(program.to_dict(), allow_nan=False)


def test_tokens_of_a_convolution_are_its_pixels():
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(2))

        def forward(self, x):
            for f in self.f:
                x = x + torch.relu(f(x))
            return x

    explanation = mhc_compile.explain(Convolved(), torch.randn(3, C, 5, 7))
    assert explanation.graphs[0].tokens == 3 * 5 * 7
    assert explanation.added.activations == 2 * 3 * 5 * 7 * (5 * N - 1) * C


def test_nothing_to_rewrite_has_no_overhead():
    assert mhc_compile.explain(nn.Linear(2, 2), torch.randn(3, 2)).overheads == ()


def test_dynamic_sizes_stay_dynamic_and_count_as_they_are():
    inputs = torch.randn(2, TOKENS // 2, C)
    static = mhc_compile.explain(nn.Sequential(Block(), Block()), inputs)
    for axis in (0, 1):
        torch._dynamo.mark_dynamic(inputs, axis)  # an error, if explain made a number of it
    dynamic = mhc_compile.explain(nn.Sequential(Block(), Block()), inputs)
    assert (dynamic.plain, dynamic.added, dynamic.floor) == (static.plain, static.added, static.floor)
    assert dynamic.graphs[0].tokens == TOKENS
    tokens, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(
        nn.Sequential(Block(), Block()), (torch.randn(2, TOKENS // 2, C),), dynamic_shapes=[{0: tokens, 1: length}]
    )
    assert mhc_compile.explain(program).plain == static.plain
