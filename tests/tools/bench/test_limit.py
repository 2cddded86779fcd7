"""The floor is a formula, and what is measured has its sizes."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.tools.bench.limit import CopyLimit, Limit, in_step, moved
from mhc_compile.tools.bench.sites import Shape
from mhc_compile.tools.bench.workloads import SITES, Times, Workload


@pytest.mark.parametrize("width", [8, 256])
def test_four_streams_move_10_and_15_widths_a_token(width):
    forward, backward = moved(Shape(width=width))
    assert (sum(forward), sum(backward)) == (10 * width, 15 * width)
    assert (forward.read, forward.written) == (5 * width, 5 * width)
    assert (backward.read, backward.written) == (10 * width, 5 * width)


def test_the_buffers_have_the_size_of_the_traffic_and_the_products_their_flops(monkeypatch):
    shape = Shape(width=16, tokens=8)
    limit = Limit(shape)
    products, moves = [], []
    real = torch.mm

    def mm(a, b, out):
        products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return real(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "add", lambda a, b, out: moves.append(a.numel() + b.numel() + out.numel()))
    limit.forward()
    limit.backward(None)
    assert products == [2 * 8 * (4 * 16) * 24] * 3 * SITES  # T × nC × (n² + 2n), once forward and twice backward
    assert sum(moves) == SITES * sum(moved(shape)[1]) * shape.tokens
    source, _, target = limit._sites[0]
    assert source.numel() + target.numel() == sum(moved(shape)[0]) * shape.tokens
    Limit(shape, gradients=False).backward(None)
    assert len(products) == 3 * SITES
    assert len({tensor.data_ptr() for site in limit._sites for tensor in site}) == 3 * SITES


def test_the_limit_of_a_step_is_plain_and_every_site():
    assert in_step(Times(1.0, 2.0, 4.0), Times(0.1, 0.2, 0.3), 8) == Times(1.8, 3.6, pytest.approx(6.4))


def test_on_cuda_the_limit_is_the_bytes_of_a_site_at_the_bandwidth_of_a_copy(monkeypatch):
    shape = Shape(width=16, tokens=10)
    limit = CopyLimit(shape, size=1 << 10)
    monkeypatch.setattr(Workload, "timed", lambda self: Times(2.0, 0.0, 2.0, 0.5))
    times = limit.timed()
    bandwidth = 2 * 1024 / 2.0  # a copy reads and writes
    assert times.forward == pytest.approx(10 * 16 * 10 * 4 / bandwidth)
    assert times.backward == pytest.approx(15 * 16 * 10 * 4 / bandwidth)
    assert times.total == times.forward + times.backward
    assert CopyLimit(shape, size=1 << 10, gradients=False).timed().backward == 0
    limit.forward()
    assert torch.equal(limit._source, limit._target)
