"""`mhc_compile.stability`: every figure against a computation of its own, and the model as it
was.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.builders import LAYERS, Decoder, Small, build, points, tokens
from helpers.gates import scatter
from torch import nn

import mhc_compile
import mhc_compile.errors

EAGER = {"inner_backend": "eager"}
MHC = {"backend": "mhc", "options": EAGER}
#: The default gate_speed and scale_speed: logits are a z / 128 + 32 b.
SPEED, SLOW = 32, 1 / 128


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def trained(model, *inputs, std=1.0, phi=0.3, **kwargs):
    """`model` with hyper-connections as if it had been trained for long."""
    mhc_compile.attach(model, *inputs, **kwargs)
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            connection.bias.add_(torch.randn_like(connection.bias) * std / SPEED)
            connection.phi.normal_(std=phi)
            connection.scale.fill_(1.0 / SLOW)
    return model


# --- the figures
# --------------------------------------------------------------------------------------------------


def test_how_far_gates_have_moved():
    """Static gates of the identity mapping are two sigmoids: no operator is needed to know them."""
    model = Small()
    mhc_compile.attach(model, points(), options={"token_dependent": False, "mapping": "identity"})
    then = {path: SPEED * c.bias.detach().double() for path, c in mhc_compile.connections(model).items()}
    assert mhc_compile.stability(model, points()).moved == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            connection.bias.add_(torch.randn_like(connection.bias) / SPEED)
    result = mhc_compile.stability(model, points())
    for site in result.sites:
        now = SPEED * mhc_compile.connections(model)[site.path].bias.detach().double()
        pre, post = (now.sigmoid() - then[site.path].sigmoid()).split(4)
        want = max(pre.square().mean().sqrt().item(), 2 * post.square().mean().sqrt().item())
        assert site.moved == pytest.approx(want, rel=1e-5)
    assert result.moved == max(site.moved for site in result.sites)


class Deep(nn.Module):
    """`depth` residual adds."""

    def __init__(self, depth, width=4):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for part in self.parts:
            x = x + torch.tanh(part(x))
        return x


def framed(depth, width=4):
    """With something before it and behind it."""
    return nn.Sequential(nn.Linear(width, width), Deep(depth, width), nn.Linear(width, width))


def by_hand(model, inputs, iterations=20):
    """The streams [tokens, n, C] before every site and behind the last, and pre, post and H_res of
    every site, in plain float64.
    """
    weights = dict(model.named_parameters())
    streams = F.linear(inputs, weights["0.weight"], weights["0.bias"]).flatten(0, 1).unsqueeze(-2).expand(-1, 4, -1)
    entering, coefficients = [], []
    for number in range(len(model[1].parts)):
        phi, bias, scale = (weights[f"1.mhc.parts.{number}.{part}"] for part in ("phi", "bias", "scale"))
        bias, scale = SPEED * bias, SLOW * scale
        flat = streams.flatten(-2)
        z = (flat @ phi) / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        pre = torch.sigmoid(scale[0] * z[..., :4] + bias[:4])
        post = 2 * torch.sigmoid(scale[1] * z[..., 4:8] + bias[4:8])
        matrix = (scale[2] * z[..., 8:] + bias[8:]).unflatten(-1, (4, 4)).exp()
        for _ in range(iterations):
            matrix = matrix / matrix.sum(-2, keepdim=True)
            matrix = matrix / matrix.sum(-1, keepdim=True)
        entering.append(streams)
        coefficients.append((pre, post, matrix))
        read = (pre.unsqueeze(-1) * streams).sum(-2)
        out = torch.tanh(F.linear(read, weights[f"1.parts.{number}.weight"], weights[f"1.parts.{number}.bias"]))
        streams = matrix @ streams + post.unsqueeze(-1) * out.unsqueeze(-2)
    return [*entering, streams], coefficients


def rank_by_svd(streams):
    values = torch.linalg.svdvals(streams)
    share = values / values.sum(-1, keepdim=True)
    return (-(share * share.clamp_min(1e-300).log()).sum(-1)).exp().mean().item()


def test_every_figure_is_that_of_a_computation_by_hand():
    inputs = torch.randn(2, 5, 8).double()
    model = trained(framed(4, 8).double(), inputs, std=0.5)
    result = mhc_compile.stability(model, inputs)
    with torch.no_grad():
        entering, coefficients = by_hand(model, inputs)
    (chain,) = result.chains
    assert [site.path for site in chain.sites] == list(mhc_compile.connections(model))
    assert [site.name for site in chain.sites] == [f"1.parts.{number}" for number in range(4)]
    assert (chain.streams, chain.width, chain.merged, result.idle) == (4, 8, False, ())
    near = lambda value: pytest.approx(value, rel=1e-9, abs=1e-9)  # noqa: E731
    count = len(chain.sites)
    for index, site in enumerate(chain.sites):
        pre, post, matrix = coefficients[index]
        assert site.tokens == 10
        assert torch.tensor(site.mean).double().sub(matrix.mean(0)).abs().max() < 1e-7
        assert site.spread == near((matrix - matrix.mean(0)).abs().max().item())
        assert site.spread > 1e-3
        composite = torch.stack(
            [
                torch.linalg.multi_dot([*(m[2][t] for m in coefficients[index::-1]), torch.eye(4).double()])
                for t in range(10)
            ]
        )
        remainder = torch.stack(
            [
                torch.linalg.multi_dot(
                    [torch.eye(4).double(), *(m[2][t] for m in coefficients[: index - count - 1 : -1])]
                )
                for t in range(10)
            ]
        )
        for got, got_pair, product in (
            (site.mean, (site.forward, site.backward), matrix),
            (site.composite, (site.composite_forward, site.composite_backward), composite),
            (site.remainder, (site.remainder_forward, site.remainder_backward), remainder),
        ):
            assert torch.tensor(got).double().sub(product.mean(0)).abs().max() < 1e-7
            assert got_pair[0] == near(sum(m.abs().sum(1).max().item() for m in product) / 10)
            assert got_pair[1] == near(sum(m.abs().sum(0).max().item() for m in product) / 10)
        assert site.row_error == near((matrix.sum(-1) - 1).abs().max().item())
        assert site.column_error == near((matrix.sum(-2) - 1).abs().max().item())
        assert site.lowest == near(matrix.min().item())
        for got, values in ((site.pre, pre), (site.post, post)):
            assert got.mean == near(values.mean(0).tolist())
            assert got.std == near(values.std(0, correction=0).tolist())
            assert got.minimum == near(values.amin(0).tolist())
            assert got.maximum == near(values.amax(0).tolist())
    for index, (got, streams) in enumerate(zip(chain.geometry, entering, strict=True)):
        pairs = [(i, j) for i in range(4) for j in range(i)]
        cosines = [torch.cosine_similarity(streams[:, i], streams[:, j], dim=-1).mean().item() for i, j in pairs]
        mean = streams.mean(-2, keepdim=True)
        assert got.similarity == near(sum(cosines) / len(cosines))
        assert got.effective_rank == pytest.approx(rank_by_svd(streams), rel=1e-6)
        assert got.distance == near(((streams - mean).square().mean().sqrt() / mean.square().mean().sqrt()).item())
        assert (got.distance > 1e-2) == (index > 0)
    assert chain.amax_forward == max(site.composite_forward for site in chain.sites)
    assert chain.amax_backward == max(site.remainder_backward for site in chain.sites) > 1.0


def test_over_64_sites_sinkhorn_is_bounded_where_unconstrained_mixing_grows():
    model = Deep(64)
    points = torch.randn(3, 5, 4)
    mhc_compile.attach(model, points)
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            connection.bias[8:].normal_(std=1.0 / SPEED)
    result = mhc_compile.stability(model, points)
    assert len(result.sites) == 64
    product, loose = torch.eye(4).double(), torch.eye(4).double()
    for connection, site in zip(mhc_compile.connections(model).values(), result.sites, strict=True):
        logits = SPEED * connection.bias[8:].detach().double().reshape(4, 4)
        matrix = logits.exp()
        for _ in range(20):
            matrix = matrix / matrix.sum(0, keepdim=True)
            matrix = matrix / matrix.sum(1, keepdim=True)
        product = matrix @ product
        loose = (torch.eye(4).double() + logits) @ loose
        assert site.composite_forward == pytest.approx(product.abs().sum(1).max().item(), abs=1e-5)
        assert site.composite_backward == pytest.approx(product.abs().sum(0).max().item(), abs=1e-5)
    assert result.amax_forward <= 2
    assert result.amax_backward <= 2
    assert loose.abs().sum(1).max() > 1e6
    assert loose.abs().sum(0).max() > 1e6


@pytest.mark.slow
def test_over_64_sites_the_unconstrained_mapping_grows_without_bound():
    model, inputs = Deep(64), torch.randn(3, 5, 4)
    mhc_compile.attach(model, inputs, options={"mapping": "unconstrained"})
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            connection.bias[8:].add_(torch.randn(16))
    result = mhc_compile.stability(model, inputs)
    assert result.amax_forward > 1e6
    assert result.amax_backward > 1e6
    assert min(site.lowest for site in result.sites) < -1
    growth = [site.composite_forward for site in result.sites][::16]
    assert growth == sorted(growth)


def test_streams_of_known_geometry():
    from mhc_compile.inspection.stream_stats.recorder import geometry

    copies = torch.randn(2, 7, 1, 16).expand(-1, -1, 4, -1)
    one = geometry(copies)
    assert (one.similarity, one.effective_rank, one.distance) == (pytest.approx(1.0, abs=1e-12), 1.0, 0.0)
    apart = torch.zeros(3, 4, 16)
    apart[:, range(4), range(4)] = 2.0
    one = geometry(apart)
    assert (one.similarity, one.effective_rank) == (0.0, pytest.approx(4.0))
    assert one.distance == pytest.approx(3**0.5)
    padded = torch.cat([apart, torch.zeros(5, 4, 16)])
    assert geometry(padded) == one  # tokens of zeros have no direction
    assert geometry(torch.zeros(2, 4, 16)).distance == 0.0
    assert math.isnan(geometry(torch.full((2, 4, 16), torch.inf)).similarity)
    # In chunks as in one piece.
    streams = torch.randn(9, 4, 16)
    whole = geometry(streams)
    parts = geometry(streams, chunk=128)
    assert parts.distance == pytest.approx(whole.distance, rel=1e-12)
    assert parts.effective_rank == pytest.approx(whole.effective_rank, rel=1e-12)


def test_an_unattached_model_has_nothing_to_measure():
    with pytest.raises(mhc_compile.errors.AttachError, match="Decoder has no hyper-connections to measure"):
        mhc_compile.stability(Decoder(), tokens())


def test_composite_gains_multiply_over_depth():
    model = Decoder()
    options = {"inner_backend": "eager"}
    mhc_compile.attach(model, tokens(), options=options)
    with torch.no_grad():
        for connection in mhc_compile.connections(model).values():
            connection.bias.normal_(std=2.0)
    (chain,) = mhc_compile.stability(model, tokens(), options=options).chains
    product = torch.eye(4)
    for site, connection in zip(chain.sites, mhc_compile.connections(model).values(), strict=True):
        streams = torch.zeros(1, 4, 8)
        product = connection.coefficients(streams)[2][0].detach() @ product  # phi = 0: the same for every token
        assert site.composite_forward == pytest.approx(product.sum(-1).max().item(), abs=1e-5)
        assert site.composite_backward == pytest.approx(product.sum(-2).max().item(), abs=1e-5)
    assert max(site.composite_backward for site in chain.sites) > 1.0


@pytest.mark.slow
def test_half_precision_is_measured_in_double():
    points = torch.randn(3, 5, 4)
    model = trained(Deep(4), points, std=0.5)
    want = mhc_compile.stability(model, points)
    got = mhc_compile.stability(copy.deepcopy(model).bfloat16(), points.bfloat16())
    assert (want.dtype, got.dtype) == ("float32", "bfloat16")
    for one, other in zip(got.sites, want.sites, strict=True):
        assert one.row_error < 1e-6  # coefficients stay in float32
        assert one.composite_backward == pytest.approx(other.composite_backward, rel=0.02)
        assert one.entering.similarity == pytest.approx(other.entering.similarity, abs=0.05)


# --- chains
# --------------------------------------------------------------------------------------------------


class TwoBranches(nn.Module):
    """A block whose graph breaks behind it, inside its second branch, or nowhere."""

    def __init__(self, breaks):
        super().__init__()
        self.breaks = breaks
        self.first, self.norm, self.second, self.out = (
            nn.Linear(6, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
        )

    def forward(self, x):
        x = x + torch.tanh(self.first(x))
        hidden = self.second(self.norm(x))
        if self.breaks == "inside":
            torch._dynamo.graph_break()
        x = x + self.out(torch.tanh(hidden))
        if self.breaks == "behind":
            torch._dynamo.graph_break()
        return x


def in_pieces(breaks):
    return nn.Sequential(nn.Linear(6, 6), *(TwoBranches(breaks) for _ in range(2)), nn.Linear(6, 6))


@pytest.mark.parametrize("breaks", [pytest.param("behind", marks=pytest.mark.slow), "inside"])
def test_a_chain_that_goes_on_in_other_graphs_is_one_chain(breaks):
    model, whole, inputs = in_pieces(breaks), in_pieces(""), torch.randn(2, 5, 6)
    mhc_compile.attach(model, inputs)
    trained(model, inputs, std=0.5)
    mhc_compile.attach(whole, inputs)
    whole.load_state_dict(model.state_dict())
    got, want = mhc_compile.stability(model, inputs), mhc_compile.stability(whole, inputs)
    assert [len(chain.sites) for chain in got.chains] == [4]
    assert [site.path for site in got.sites] == [site.path for site in want.sites]
    for one, other in zip(got.sites, want.sites, strict=True):
        assert one.remainder_backward == pytest.approx(other.remainder_backward, abs=1e-6)
        assert one.entering.distance == pytest.approx(other.entering.distance, abs=1e-6)
        assert one.pre.mean == pytest.approx(other.pre.mean, abs=1e-6)


@pytest.mark.slow
def test_blocks_compiled_one_by_one_are_one_chain():
    model, inputs = in_pieces(""), torch.randn(2, 5, 6)
    for block in model[1:3]:
        block.compile(**MHC)
    model(inputs)
    result = mhc_compile.stability(model, inputs)
    assert [len(chain.sites) for chain in result.chains] == [4]
    assert [site.path for site in result.sites] == list(mhc_compile.connections(model))


class Nested(nn.Module):
    """A chain whose branches are chains of another width."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.inner, self.up = nn.Linear(8, 6), Deep(2, 6), nn.Linear(6, 8)

        def forward(self, x):
            return x + self.up(self.inner(self.down(x)))

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(self.Outer() for _ in range(2))

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_chains_in_branches_are_chains_of_their_own():
    model, points = Nested(), torch.randn(2, 3, 8)
    trained(model, points)
    result = mhc_compile.stability(model, points)
    found = {tuple(site.name for site in chain.sites): chain.width for chain in result.chains}
    outer = [names for names, width in found.items() if width == 8]
    assert len(outer) == 1
    assert len(outer[0]) == 2
    assert sorted(map(len, (names for names, width in found.items() if width == 6))) == [2, 2]


def test_a_read_out_with_as_many_tokens_as_streams_ends_the_chain():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.between, self.second = Deep(2, 4), nn.Linear(4, 4), Deep(2, 4)

        def forward(self, x):
            return self.second(self.between(self.first(x)))

    model, points = Two(), torch.randn(3, 4, 4)
    trained(model, points)
    assert [len(chain.sites) for chain in mhc_compile.stability(model, points).chains] == [2, 2]


def test_tokens_cut_off_along_a_chain_are_reported():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Deep(2), Deep(2)

        def forward(self, x):
            return self.second(self.first(x)[:, 1:])

    model, points = Cut(), torch.randn(2, 5, 4)
    trained(model, points)
    result = mhc_compile.stability(model, points)
    (chain,) = result.chains
    assert chain.merged
    assert [site.tokens for site in chain.sites] == [10, 10, 8, 8]
    assert any("number of tokens changes" in remark for remark in result.remarks)
    assert chain.amax_forward == pytest.approx(1.0, abs=1e-5)


def test_a_rewritten_graph_module_is_measured_as_it_is():
    model, points = Deep(3), torch.randn(2, 5, 4)
    rewritten = mhc_compile.rewrite(torch.fx.symbolic_trace(model), points)
    with torch.no_grad():
        for connection in mhc_compile.connections(rewritten).values():
            connection.bias.normal_()
    before = rewritten(points)
    result = mhc_compile.stability(rewritten, points)
    assert [site.path for site in result.sites] == list(mhc_compile.connections(rewritten))
    assert torch.equal(rewritten(points), before)


@pytest.mark.slow
def test_the_fused_encoder_layer_is_measured_in_eval_mode():
    case = build("encoder")
    mhc_compile.attach(case.model, **case.inputs)
    case.model.eval()
    result = mhc_compile.stability(case.model, **case.inputs)
    assert len(result.sites) == 2 * LAYERS
    assert result.mode == "eval"


# --- the model as it was
# --------------------------------------------------------------------------------------------------


class Moody(nn.Module):
    """Batch statistics, dropout, and a mode that it looks at."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x):
        x = x + self.drop(self.first(x))
        return x + self.second(self.norm(x))


def test_the_model_stays_as_it_was():
    model, points = Moody(), torch.randn(7, 6)
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    compiled(points).sum().backward()
    model.second.eval()
    state = copy.deepcopy(model.state_dict())
    versions = [value._version for value in model.parameters()]
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    modes = [module.training for module in model.modules()]
    numbers = torch.get_rng_state()
    one = mhc_compile.stability(compiled, points)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [value._version for value in model.parameters()] == versions
    assert gradients.keys() == {name for name, value in model.named_parameters() if value.grad is not None}
    assert all(
        torch.equal(value.grad, gradients[name]) for name, value in model.named_parameters() if name in gradients
    )
    assert mhc_compile.stability(model, points) == one
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_compiled_versions_stay():
    graphs = []

    def counting(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    model, points = Deep(2), torch.randn(3, 5, 4)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": counting})
    compiled(points)
    compiled(points)
    count = len(graphs)
    for batch in (2, 3):
        mhc_compile.stability(compiled, points[:batch])
    compiled(points)
    assert len(graphs) == count == 1


@pytest.mark.parametrize(
    "compile_", [lambda m: m.compile(**MHC), lambda m: setattr(m, "pair", torch.compile(m.pair, **MHC))]
)
def test_a_model_compiled_in_place_is_looked_at_and_not_run_as_it_was_compiled(compile_):
    model = Small()
    compile_(model)
    assert len(mhc_compile.explain(model, points()).sites) == 2
    assert len(mhc_compile.attach(model, points())) == 2
    assert len(mhc_compile.stability(model, points()).sites) == 2
    model(points())
    model(points())
    assert len(mhc_compile.stability(model, points()).sites) == 2


# --- what it is called with
# --------------------------------------------------------------------------------------------------


def test_batches_as_loaders_give_them():
    class Masked(Deep):
        def forward(self, x, mask=None):
            return super().forward(x if mask is None else x * mask)

    points, ones = torch.randn(3, 5, 4), torch.ones(3, 5, 1)
    model = trained(Masked(2), points)
    want = mhc_compile.stability(model, points, ones)
    assert mhc_compile.stability(model, (points, ones, "label")) == want
    assert mhc_compile.stability(model, [points, ones]) == want
    assert mhc_compile.stability(model, {"x": points, "labels": ones}) == want
    assert mhc_compile.stability(model, x=points) == want
    assert mhc_compile.stability(model, {"x": points, "mask": 0 * ones}) != want


def test_options_are_those_of_the_hyper_connections():
    model, points = Deep(2), torch.randn(3, 4)
    mhc_compile.attach(model, points, options={"streams": 2, "mapping": "identity"})
    result = mhc_compile.stability(model, points)
    assert result.chains[0].streams == 2
    assert result.sites[0].mean == ((1.0, 0.0), (0.0, 1.0))
    with pytest.raises(mhc_compile.errors.AttachError, match="streams=2, the options say streams=4"):
        mhc_compile.stability(model, points, options={"mapping": "identity"})


def test_a_plain_model_is_rejected():
    with pytest.raises(mhc_compile.errors.AttachError, match="Decoder has no hyper-connections to measure"):
        mhc_compile.stability(Decoder(), tokens())


# --- what it looks like
# --------------------------------------------------------------------------------------------------


def test_the_start_is_explained():
    model, points = Deep(2), torch.randn(3, 4)
    mhc_compile.attach(model, points)
    remarks = mhc_compile.stability(model, points).remarks
    assert [remark.split(":")[0].split(", and")[0] for remark in remarks] == [
        "All streams are copies of each other",
        "H_res is the same for every token",
    ]
    trained(model, points)
    assert mhc_compile.stability(model, points).remarks == ()


def test_hyper_connections_without_a_part_are_named():
    class Half(Deep):
        def forward(self, x, depth=4):
            for part in self.parts[:depth]:
                x = x + part(x)
            return x

    points = torch.randn(3, 4)
    model = trained(Half(4), points)
    result = mhc_compile.stability(model, points, 2)
    assert result.idle == ("mhc.parts.2", "mhc.parts.3")
    assert "2 hyper-connections had no part in this call (mhc.parts.2, ...)" in result.remarks


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 4)
    return mhc_compile.stability(trained(framed(4), inputs, std=2.0), inputs)


def test_a_site_that_the_model_did_not_run_before_gets_nothing_from_a_measurement():
    class Growing(Deep):
        def forward(self, x, depth=2):
            for part in self.parts[:depth]:
                x = x + part(x)
            return x

    model, inputs = Growing(3), torch.randn(3, 4)
    mhc_compile.attach(model, inputs)
    with pytest.raises(
        mhc_compile.errors.AttachError, match=r"site mhc.parts.2 of Growing has no hyper-connection yet"
    ):
        mhc_compile.stability(model, inputs, 3)
    assert list(mhc_compile.connections(model)) == ["mhc.parts.0", "mhc.parts.1"]
    mhc_compile.attach(model, inputs, 3)
    assert len(mhc_compile.stability(model, inputs, 3).sites) == 3


@pytest.mark.parametrize("width", [50, 80, 140])
def test_the_table_has_a_row_for_each_site_and_fits(width, measured):
    from rich.console import Console

    result = measured
    console = Console(width=width)
    with console.capture() as capture:
        console.print(result)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    for site in result.sites:
        (row,) = (line for line in lines if line.startswith(site.name))
        assert f"{site.composite_forward:.3f}" in row
        assert f"{site.remainder_backward:.3f}" in row
    assert f"{result.amax_backward:.3f} backward" in " ".join(" ".join(lines).split())
    assert ("pre" in capture.get()) == (width == 140)
    assert result.sites[0].name in result._repr_html_()


def test_non_finite_figures_are_shown_and_json_has_no_nan(measured, tmp_path):
    points = torch.randn(3, 4)
    model = trained(Deep(3), points)
    with torch.no_grad():
        model.parts[1].bias[0] = torch.nan
    result = mhc_compile.stability(model, points)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["chains"][0]["sites"][2]["composite_forward"] is None
    assert data["chains"][0]["sites"][1]["composite_forward"] == result.sites[1].composite_forward
    assert data["summary"]["similarity"] is None
    assert math.isnan(result.amax_forward)
    assert math.isnan(result.summary()["column_error"])
    result.plot(tmp_path / "broken.png")
    assert measured.to_dict()["summary"] == measured.summary()
    assert len(measured.to_dict()["chains"][0]["sites"]) == 4


def test_a_png_is_drawn_with_every_chain(tmp_path, measured):
    from mhc_compile.inspection.stream_stats.plots import draw

    measured.plot(tmp_path / "stability.png")
    assert (tmp_path / "stability.png").read_bytes().startswith(b"\x89PNG")
    figure = draw(replace(measured, chains=measured.chains * 2))
    texts = [text.get_text() for axis in figure.findobj(lambda one: hasattr(one, "texts")) for text in axis.texts]
    for site in measured.sites:
        assert f"{site.mean[0][0]:.2f}" in texts
        assert f"{sum(row[1] for row in site.composite):.2f}" in texts
    lines = [line for axis in figure.get_axes() for line in axis.get_lines()]
    curves = {
        "forward, start": [site.composite_forward for site in measured.sites],
        "effective": [one.effective_rank for one in measured.chains[0].geometry],
    }
    for label, values in curves.items():
        assert [list(line.get_ydata()) for line in lines if str(line.get_label()).startswith(label)] == [values] * 2


def test_without_matplotlib_the_way_out_is_named(monkeypatch, tmp_path, measured):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(mhc_compile.MhcError, match=r'pip install "matplotlib'):
        measured.plot(tmp_path / "stability.png")


# --- other conventions
# --------------------------------------------------------------------------------------------------


QUICK = (
    {"preset": "deepseek-v4.1"},
    {"overrides": {"1.parts.1": {"mapping": "identity", "token_dependent": False}}},
)
MORE = (
    {"preset": "qwen4-exp", "init": "random"},
    {"mapping": "permutations"},
    {"mapping": "kronecker"},
    {"mapping": "unconstrained"},
    {"preset": "deepseek-v4", "init": "random"},
    {"token_dependent": False},
    {"read_out": "sum", "init": "random"},
)


@pytest.mark.parametrize(
    "options",
    [*QUICK, *(pytest.param(options, marks=pytest.mark.slow) for options in MORE)],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_convention_of_the_model_is_read_from_its_connections(options):
    model, inputs = framed(3), torch.randn(2, 4, 4)
    found = mhc_compile.attach(model, inputs, options=options)
    scatter(model, 0.3, add=True)
    seen = mhc_compile.stability(model, inputs)
    (chain,) = seen.chains
    assert [site.path for site in chain.sites] == list(found)
    assert seen.remarks == () or options == {"token_dependent": False} or "qwen4-exp" in options.values()
    identity = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    for site, connection in zip(chain.sites, found.values(), strict=True):
        assert (site.pre is None) == (connection.rank > 0)
        assert (site.mean == identity) == (connection.mapping == "identity")
        assert (site.row_error < 1e-3) == (connection.mapping != "unconstrained")
