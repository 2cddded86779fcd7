"""The rewrite: operations are there, the numbers hold, other readers get the mean, a second run
changes nothing.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.gates import scatter
from helpers.graphs import C, Model
from helpers.stream_interpreter import StreamInterpreter, record_expansions
from torch import fx

import mhc_compile
import mhc_compile.errors
from mhc_compile.passes.analysis.op_info import op_name, tensor_value
from mhc_compile.passes.transforms import expand_streams

mhc = torch.ops.mhc


def two_sites(m, x):
    x = x + m.f(m.norm(x))
    return x + m.g(m.norm(x))


def rewritten(forward, x=None, **options) -> tuple[fx.GraphModule, Model, torch.Tensor]:
    x = torch.randn(2, 4, C) if x is None else x
    model = Model(forward)
    return mhc_compile.rewrite(fx.symbolic_trace(model), x, options=options), model, x


def operations(module: fx.GraphModule) -> Counter[str]:
    return Counter(op_name(node) for node in module.graph.nodes if node.op == "call_function")


def test_adds_become_operations_on_streams():
    module, model, x = rewritten(two_sites)
    before = operations(fx.symbolic_trace(model))
    after = operations(module)
    assert before["add"] == 2
    assert after["add"] == 0
    assert (after["coefficients"], after["collapse"], after["update"], after["mean"]) == (2, 2, 2, 1)
    assert (module(x) - model(x)).abs().max() < 1e-6


def test_parameters_are_registered_under_the_owner():
    module, _, _ = rewritten(two_sites)
    added = sorted(name for name, _ in module.named_parameters() if "mhc" in name)
    assert added == [f"mhc.{branch}.{part}" for branch in "fg" for part in ("bias", "phi", "scale")]


def test_the_input_is_not_mutated():
    model = Model(two_sites)
    traced = fx.symbolic_trace(model)
    text, names = str(traced.graph), [name for name, _ in model.named_modules()]
    mhc_compile.rewrite(traced, torch.randn(2, 4, C))
    assert str(traced.graph) == text
    assert [name for name, _ in model.named_modules()] == names


def test_a_second_run_changes_nothing():
    module, _, x = rewritten(two_sites)
    again = mhc_compile.rewrite(module, x)
    assert str(again.graph) == str(module.graph)
    assert dict(again.named_parameters()).keys() == dict(module.named_parameters()).keys()


def test_other_readers_get_the_mean_of_the_streams():
    def forward(m, x):
        first = x + m.f(x)
        second = first + m.g(first)
        return second, first, x  # hidden states

    module, model, x = rewritten(forward)
    assert operations(module)["mean"] == 2
    torch.nn.init.normal_(module.mhc.f.bias)
    torch.nn.init.normal_(module.mhc.g.bias)
    second, first, same = module(x)
    assert torch.equal(same, x)
    # The first hidden state is the mean of the streams after the first site, with its own numbers.
    streams = x.unsqueeze(-2).expand(-1, -1, 4, -1)
    streams = module.mhc.f(streams, model.f)
    assert torch.allclose(first, streams.mean(-2), atol=1e-6)
    assert torch.allclose(second, module.mhc.g(streams, model.g).mean(-2), atol=1e-6)


def test_parallel_branches_are_one_site():
    module, model, x = rewritten(lambda m, x: (y := x + m.f(x) + m.g(m.norm(x))) + m.f(y))
    after = operations(module)
    assert (after["update"], after["add"]) == (2, 1)  # the one add joins the two branches
    assert (module(x) - model(x)).abs().max() < 1e-6


def by_hand(module, x, site, branch, axis=-1):
    """One site on streams [..., n, C] of a trunk whose features lie on `axis`, from the module's
    own parameters.
    """

    def last(y):
        return branch(y.movedim(-1, axis)).movedim(axis, -1)

    return module.get_submodule(f"mhc.{site}")(x, last)


def unequal(module):
    scatter(module, 1.0)


@pytest.mark.parametrize(
    ("between", "on_streams"),
    [
        (lambda m, y: y.reshape(-1, C), lambda m, S: S.flatten(0, 1)),
        (lambda m, y: y.view(-1, C), lambda m, S: S.flatten(0, 1)),
        (lambda m, y: y.flatten(0, 1), lambda m, S: S.flatten(0, 1)),
        (lambda m, y: y.transpose(0, 1), lambda m, S: S.transpose(0, 1)),
        (lambda m, y: torch.ops.aten._unsafe_view.default(y, [8, C]), lambda m, S: S.flatten(0, 1)),
        (lambda m, y: torch.relu(y), lambda m, S: torch.relu(S)),
        (lambda m, y: m.norm_f(y), lambda m, S: m.norm_f(S)),
        (lambda m, y: y * m.vector * 0.5, lambda m, S: S * m.vector * 0.5),
        (
            lambda m, y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6),
            lambda m, S: S * torch.rsqrt(S.pow(2).mean(-1, keepdim=True) + 1e-6),
        ),
        (
            lambda m, y: y * torch.arange(2.0)[:, None, None],
            lambda m, S: S * torch.arange(2.0)[:, None, None, None],
        ),
    ],
)
def test_lifted_operations_keep_the_numbers_of_unequal_streams(between, on_streams):
    module, model, x = rewritten(lambda m, x: (y := between(m, x + m.f(x))) + m.g(y))
    assert operations(module)["update"] == 2
    assert (module(x) - model(x)).abs().max() < 2e-6  # equal streams: the plain model
    unequal(module)
    streams = by_hand(module, x.unsqueeze(-2).expand(-1, -1, 4, -1), "f", model.f)
    want = by_hand(module, on_streams(model, streams), "g", model.g).mean(-2)
    assert torch.allclose(module(x), want, atol=1e-5)


#: Trunk operations between two sites of a trunk [2, 4, C] with features last, by the rule that
#: lifts them.
LAST = {
    "as written: relu": lambda m, y: torch.relu(y),
    "as written: layer norm": lambda m, y: m.norm_f(y),
    "as written: leaf layer norm": lambda m, y: m.norm(y),
    "as written: vector": lambda m, y: y * m.vector + m.vector,
    "as written: gate of tokens": lambda m, y: y * torch.arange(1.0, 3.0)[:, None, None],
    "as written: rms norm": lambda m, y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3),
    "as written: cast": lambda m, y: y.float().clamp(-1.0, 1.0).double(),
    "permuted: transpose": lambda m, y: y.transpose(0, 1),
    "permuted: permute": lambda m, y: torch.tanh(y.permute(1, 2, 0)).permute(2, 0, 1),
    "reshaped: reshape": lambda m, y: y.reshape(-1, C),
    "reshaped: view": lambda m, y: y.view(4, 2, C),
    "reshaped: flatten": lambda m, y: y.flatten(0, 1),
    "dropped": lambda m, y: F.dropout(y, 0.4),
    "dropped: after a transpose": lambda m, y: F.dropout(y.transpose(0, 1), 0.4),
    "vmapped: softmax of tokens": lambda m, y: y.softmax(1),
    "vmapped: roll": lambda m, y: y.roll(1, 1),
    "vmapped: slice and pad": lambda m, y: F.pad(y[:, 1:], (0, 0, 0, 1)),
    "vmapped: pool": lambda m, y: F.avg_pool1d(y.transpose(1, 2), 2).transpose(1, 2),
    "vmapped: two operands": lambda m, y: torch.cat([y[:, 2:], torch.tanh(y)], 1),
    "vmapped: a mask of the mean": lambda m, y: torch.where(y > 0, y, 0.1 * y),
}
#: The same for a trunk [2, 4, C] with features on axis 1.
FIRST = {
    "as written: gelu": lambda m, y: F.gelu(y),
    "as written: gate of channels": lambda m, y: y * torch.arange(1.0, 5.0)[None, :, None],
    "permuted": lambda m, y: torch.relu(y.transpose(1, 2)).transpose(1, 2),
    "dropped": lambda m, y: F.dropout(y, 0.4),
    "dropped: channels": lambda m, y: F.dropout1d(y, 0.4),
    "batch norm: training": lambda m, y: F.batch_norm(y, m.zeros, m.rows, m.vector[:4], m.vector[2:], True, 0.3),
    "batch norm: without statistics": lambda m, y: F.batch_norm(y, None, None, training=True),
    "batch norm: eval": lambda m, y: F.batch_norm(y, m.zeros, m.rows),
    "batch norm: ATen": lambda m, y: torch.batch_norm(y, None, None, m.zeros, m.rows, True, 0.3, 1e-5, False),
    "vmapped: pool": lambda m, y: F.max_pool1d(y, 2),
    "vmapped: interpolate": lambda m, y: F.interpolate(y, scale_factor=2.0, mode="linear"),
    "group norm": lambda m, y: F.group_norm(y, 2, m.rows),
    "vmapped: unflatten": lambda m, y: torch.relu(y.unflatten(2, (2, 3))).flatten(2),
}
#: The same for a trunk [2, 4, 2, C] of images.
IMAGES = {
    "group norm": lambda m, y: F.group_norm(y, 2, m.rows, m.zeros),
    "group norm and pool": lambda m, y: F.max_pool2d(F.group_norm(y, 1), 2),
    "channels last": lambda m, y: y.contiguous(memory_format=torch.channels_last).relu(),
    "channels last, by a cast": lambda m, y: y.to(memory_format=torch.channels_last).relu(),
}


def long_skip_of_batch_norm(m, x):
    y = x + m.conv(x)
    z = y + m.conv(torch.tanh(y)) + F.batch_norm(y, m.zeros, m.rows, training=True)
    return z + m.conv(z)


#: Programs, by what is special about their readers, skips or branches, with the number of their
#: sites.
STRUCTURES = {
    "hidden states": (3, lambda m, x: (y := x + m.f(x), y * m.vector, (z := y + m.g(y)) + m.f(z))),
    "an inner value is read elsewhere": (2, lambda m, x: (z := torch.tanh(h := 0.5 * (x + m.f(x))), h, z + m.g(z))),
    "dropout that is read elsewhere": (2, lambda m, x: (z := torch.tanh(h := F.dropout(x + m.f(x))), h, z + m.g(z))),
    "scaled skip": (2, lambda m, x: 0.7 * (y := x + m.f(x)) + m.g(m.norm(y))),
    "sliced skip": (2, lambda m, x: (y := x + m.f(x))[:, 1:] + m.g(y)[:, 1:]),
    "pooled skip": (2, lambda m, x: F.max_pool1d(y := x + m.conv(x), 2) + F.max_pool1d(m.conv(y), 2)),
    "dropped skip": (2, lambda m, x: F.dropout(y := x + m.f(x), 0.3) + m.g(y)),
    "shared skip": (3, lambda m, x: (h := 0.5 * (y := x + m.f(x)), h + m.g(y), h + m.f(m.norm(y)))),
    "shared dropped skip": (2, lambda m, x: (h := F.dropout(y := x + m.f(x)), h + m.g(y), h + m.f(m.norm(y)))),
    "broadcast branch": (2, lambda m, x: (y := x + m.f(x).mean(1, keepdim=True)) + m.g(y)),
    "parallel branches": (2, lambda m, x: (y := x + m.f(x) + m.g(m.norm(x))) + m.f(y)),
    "nested": (4, lambda m, x: (y := x + m.f((z := x + m.g(m.norm(x))) + m.f(z))) + m.g(y)),
    "nested, after a smaller site": (4, lambda m, x: (y := x + m.g(x)) + m.f((z := y + m.g(m.norm(y))) + m.f(z))),
    "fork": (3, lambda m, x: ((y := x + m.f(x)) + m.g(y)) * torch.sigmoid(y + m.f(torch.tanh(y)))),
    "long skip": (4, lambda m, x: (z := 0.5 * (y := x + m.f(x)) + ((w := y + m.g(y)) + m.f(w))) + m.g(z)),
    "long skip of dropout": (3, lambda m, x: (z := ((y := x + m.f(x)) + m.g(y)) + F.dropout(y)) + m.f(z)),
    "long skip of batch norm": (3, long_skip_of_batch_norm),
    "difference": (2, lambda m, x: (y := x - m.f(x)) - m.g(y)),
}


def outcome(call, module, x) -> list[torch.Tensor]:
    """Outputs, buffers, and the gradients of the input and of all parameters.

    Buffers are put back.
    """
    torch.manual_seed(1)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    got = call(leaves[0])
    outputs = list(got) if isinstance(got, tuple) else [got]
    loss = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    after = [buffer.clone() for buffer in module.buffers()]
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    return [*outputs, *after, *gradients]


def assert_like_the_definition(forward, sites=2, tolerance=1e-10, *, images=False):
    """The rewritten graph and its definition agree at random parameters.

    Every axis has a size of its own: n = 3.
    """
    torch.manual_seed(0)
    model, x = Model(forward).double(), torch.randn(2, 4, C, dtype=torch.float64)
    if images:
        model.conv, x = torch.nn.Conv2d(4, 4, 3, padding=1).double(), torch.stack([x, x.sin()], 2)
    options = {
        "streams": 3,
        "min_chain_length": 1,
        "iterations": 3,
    }  # far from convergence, where H_res hardly has a gradient
    with record_expansions() as expansions:
        module = mhc_compile.rewrite(fx.symbolic_trace(model), x, options=options)
    assert operations(module)["update"] == sites
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    scatter(module, 0.5)
    oracle = StreamInterpreter(module, *expansions)
    for one, other in zip(outcome(module, module, x), outcome(oracle.run, module, x), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("rule", LAST)
def test_lifting_is_the_operation_on_each_stream(rule):
    def forward(m, x):
        y = LAST[rule](m, x + m.f(m.norm(x)))
        return y + m.g(torch.tanh(y))

    assert_like_the_definition(forward, tolerance=1e-5 if "cast" in rule else 1e-10)


@pytest.mark.parametrize("rule", FIRST)
def test_lifting_of_channels_first_is_the_operation_on_each_stream(rule):
    def forward(m, x):
        y = FIRST[rule](m, x + m.conv(x))
        return y + m.conv(torch.tanh(y))

    assert_like_the_definition(forward)


@pytest.mark.parametrize("rule", IMAGES)
def test_lifting_of_images_is_the_operation_on_each_stream(rule):
    """The branch pools and normalises as well, and its shortcut pools."""

    def forward(m, x):
        y = IMAGES[rule](m, x + m.conv(x))
        z = F.avg_pool2d(y, 1) + F.group_norm(m.conv(F.avg_pool2d(y, 1)), 2)
        return F.group_norm(z, 4) + m.conv(F.group_norm(z, 4))

    assert_like_the_definition(forward, 3, images=True)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_streams_of_every_structure_are_those_of_the_definition(structure):
    sites, forward = STRUCTURES[structure]
    assert_like_the_definition(forward, sites)


def test_channels_first_trunks():
    module, model, x = rewritten(lambda m, x: (y := torch.relu(x + m.conv(x))) + m.conv(torch.tanh(y)))
    assert operations(module)["update"] == 2
    assert module.mhc.conv.width == 4
    assert (module(x) - model(x)).abs().max() < 2e-6
    assert module(x).stride() == model(x).stride()  # what the model's views count on
    unequal(module)
    streams = x.movedim(1, -1).unsqueeze(-2).expand(-1, -1, 4, -1)
    streams = torch.relu(by_hand(module, streams, "conv", model.conv, axis=1))
    want = by_hand(module, streams, "conv", lambda y: model.conv(torch.tanh(y)), axis=1)
    assert torch.allclose(module(x), want.mean(-2).movedim(-1, 1), atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_keep_their_memory_format(memory_format):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = torch.relu(x + self.first(x))
            x = x + self.second(x)
            return x, x.view(2, 4, 9) if x.is_contiguous() else x.permute(0, 2, 3, 1).view(2, 9, 4)

    torch.manual_seed(0)
    model = Net().to(memory_format=memory_format)
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=memory_format)
    want = model(x)
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "aot_eager"})
    got = compiled(x)
    assert len(mhc_compile.connections(model)) == 2
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert one.stride() == other.stride()


def test_a_reader_inside_a_lifted_region_reads_the_mean():
    def forward(m, x):
        y = x + m.f(x)
        halved = y * 0.5
        z = torch.relu(halved)
        return z + m.g(z), halved

    module, model, x = rewritten(forward)
    assert operations(module)["update"] == 2
    for got, want in zip(module(x), model(x), strict=True):
        assert (got - want).abs().max() < 2e-6


def test_a_branch_that_reads_the_trunk_twice_reads_the_collapsed_streams_twice():
    module, model, x = rewritten(lambda m, x: (y := x + m.f(x) * torch.sigmoid(x)) + m.g(y))
    assert (module(x) - model(x)).abs().max() < 1e-6
    first = next(node for node in module.graph.nodes if node.target is mhc.collapse.default)
    assert len(first.users) == 2


def test_a_chain_that_starts_at_the_last_graph_input_comes_after_all_of_them():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.f = torch.nn.Linear(C, C)

        def forward(self, x, y):
            x = x + self.f(x)
            return (x + self.f(x)) * y

    model = Two()
    x, y = torch.randn(2, 4, C), torch.randn(2, 4, C)
    module = mhc_compile.rewrite(fx.symbolic_trace(model), x, y)
    kinds = [node.op for node in module.graph.nodes]
    assert kinds.index("call_method") > max(i for i, kind in enumerate(kinds) if kind == "placeholder")
    assert (module(x, y) - model(x, y)).abs().max() < 1e-6


def test_shared_modules_share_parameters():
    module, model, x = rewritten(lambda m, x: (y := x + m.f(x)) + m.f(y))
    assert sum(1 for name, _ in module.named_modules() if name == "mhc.f") == 1
    assert (module(x) - model(x)).abs().max() < 1e-6


def test_rewrite_raises_with_a_message():
    with pytest.raises(
        mhc_compile.errors.CaptureError, match=r"takes a torch\.fx\.GraphModule or .*ExportedProgram, got Linear"
    ):
        mhc_compile.rewrite(torch.nn.Linear(2, 2), torch.randn(2, 2))
    with pytest.raises(mhc_compile.errors.CaptureError, match=r"example inputs \(\[2, 4, 5\]\) do not fit"):
        rewritten(two_sites, torch.randn(2, 4, 5))
    with pytest.warns(mhc_compile.MhcWarning, match="nothing was rewritten"):
        rewritten(lambda m, x: m.f(x))
    with pytest.raises(mhc_compile.errors.NothingRewrittenError, match="no addition of floating-point tensors"):
        rewritten(lambda m, x: m.f(x), strict=True)


def test_flatten_of_inner_token_axes_keeps_the_outer_ones():
    def forward(m, x):
        y = x + m.f(x)
        y = y.flatten(1, 2)
        return y + m.g(y)

    x = torch.randn(2, 3, 5, C)
    module, model, x = rewritten(forward, x)
    assert operations(module)["update"] == 2
    unequal(module)
    streams = by_hand(module, x.unsqueeze(-2).expand(-1, -1, -1, 4, -1), "f", model.f)
    want = by_hand(module, streams.flatten(1, 2), "g", model.g).mean(-2)
    assert torch.allclose(module(x), want, atol=1e-5)


def test_two_skips_of_different_age():
    """x, p = f(x) + x + p, x: the newer trunk value is a term of a sum whose skip is the
    older one.
    """

    def forward(m, x):
        p = x
        for f in (m.f, m.g, m.f, m.g):
            x, p = f(x) + x + p, x
        return x

    module, model, x = rewritten(forward, min_chain_length=1)
    assert operations(module)["update"] > 0
    assert (module(x) - model(x)).abs().max() / model(x).abs().max() < 1e-6


def test_inner_chain_starts_from_the_input_of_the_outer_branch():
    def forward(m, x):
        y = x + m.f(x)
        y = y + m.g(y)
        x = x + m.conv(m.norm(y))
        return x + m.f(m.norm(x))

    module, model, x = rewritten(forward)
    assert operations(module)["update"] == 4
    assert (module(x) - model(x)).abs().max() < 3e-6
    unequal(module)
    outer = x.unsqueeze(-2).expand(-1, -1, 4, -1)

    def inner_backend(h):
        streams = by_hand(module, h.unsqueeze(-2).expand(-1, -1, 4, -1), "f", model.f)
        return model.conv(model.norm(by_hand(module, streams, "g", model.g).mean(-2)))

    outer = by_hand(module, outer, "conv", inner_backend)
    want = by_hand(module, outer, "f", lambda h: model.f(model.norm(h))).mean(-2)
    assert torch.allclose(module(x), want, atol=1e-4)


def test_a_long_skip_adds_streams_to_streams():
    def forward(m, x):
        x = x + m.f(x)
        first = x
        x = x + m.g(x)
        x = x + m.f(x)
        x = 0.5 * first + x
        return x + m.g(x)

    module, model, x = rewritten(forward)
    assert operations(module)["update"] == 4
    assert (module(x) - model(x)).abs().max() < 2e-6
    # The sum before the last site: both terms are streams [2, 4, n, C], none is a mean that is
    # spread again.
    added = [node for node in module.graph.nodes if node.target is torch.add]
    assert [[tuple(tensor_value(term).shape) for term in node.args] for node in added] == [[(2, 4, 4, C), (2, 4, 4, C)]]


def test_trunk_written_before_its_first_reader_expands_after_the_write():
    def forward(m, x):
        trunk = x * 1.0
        trunk[:, 0].zero_()
        trunk = trunk + m.f(trunk)
        return trunk + m.g(trunk)

    module, model, x = rewritten(forward)
    assert operations(module)["update"] == 2
    assert (module(x) - model(x)).abs().max() < 1e-6


def test_the_sum_of_another_chain_is_added_as_the_mean_of_its_streams():
    def forward(m, x):
        y = (x + m.vector * m.g(x)) + (x + m.vector * m.f(x))
        return y + m.f(y)

    module, model, x = rewritten(forward, min_chain_length=1)
    assert operations(module)["update"] == 3
    assert (module(x) - model(x)).abs().max() < 1e-5


def test_an_expansion_that_loses_a_site_is_an_internal_error(monkeypatch):
    monkeypatch.setattr(expand_streams._Expansion, "_update", lambda _self, _site, streams, *_: streams)
    with pytest.raises(RuntimeError, match=r"the graph was planned with {'sites': 2,.*'sites': 0"):
        rewritten(two_sites)
