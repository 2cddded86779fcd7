"""Compiled models on a device: the plain model at the start, mHC by hand at random parameters, and
what a training on a GPU relies on (graphs, no waiting, no growth, the same bits).
"""

from __future__ import annotations

import contextlib
import gc
import resource

import pytest
import torch
from helpers.builders import Decoder
from helpers.gpu import needs_device
from helpers.hand_written import Attention, Mlp, Transformer, stir, transformer_by_hand, values_of
from torch import nn

import mhc_compile
from mhc_compile.config.presets import PRESETS

pytestmark = needs_device()
WIDTH, LENGTH = 64, 48


class Net(nn.Module):
    """Blocks of products and point-wise operations alone: nothing in it differs from run to run."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.attn = nn.ModuleList(Attention(WIDTH) for _ in range(layers))
        self.mlp = nn.ModuleList(Mlp(WIDTH) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers))

    def forward(self, x):
        for i, (attn, mlp) in enumerate(zip(self.attn, self.mlp, strict=True)):
            x = x + attn(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return x


def made(kind, *args, device, seed=0):
    """A model with the same parameters on every device."""
    torch.manual_seed(seed)
    return kind(*args).to(device)


def inputs(device, length=LENGTH, seed=0):
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device)


def compiled(model, **options):
    """The model from a random start, where streams differ from each other."""
    return torch.compile(model, backend="mhc", options={"init": "random", **options})


class Training:
    """Steps of SGD on the mean square of the output."""

    def __init__(self, call, model, x):
        self.call, self.model, self.x = call, model, x
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(self):
        torch.compiler.cudagraph_mark_step_begin()
        loss = self.call(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().clone()

    def run(self, count):
        """The losses and the parameters after `count` steps."""
        losses = torch.stack([self.step() for _ in range(count)])
        return losses, {name: value.detach().clone() for name, value in self.model.named_parameters()}


def trained(device, count, **how):
    """The same training for any `how` of `torch.compile`, which takes options or a mode."""
    torch._dynamo.reset()
    model, x = made(Net, device=device), inputs(device)
    mhc_compile.attach(model, x, options={"init": "random"})
    return Training(torch.compile(model, backend="mhc", **how), model, x).run(count)


def same(one, other, **tolerance):
    assert torch.allclose(one[0], other[0], **tolerance), (one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.allclose(value, other[1][name], **tolerance), name


def test_training_equals_the_plain_model_from_the_default_start(device):
    """Ten steps of all original parameters; hyper-connections keep their start, where they are the
    plain model for any weights.
    """
    tokens = (torch.arange(2 * LENGTH).reshape(2, LENGTH) * 7 % 11).to(device)
    losses = []
    for attached in (False, True):
        model = made(Decoder, WIDTH, device=device)
        call = model
        if attached:
            mhc_compile.attach(model, tokens)
            assert len(mhc_compile.connections(model)) == 4
            for connection in mhc_compile.connections(model).values():
                connection.requires_grad_(False)
            call = torch.compile(model, backend="mhc")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        losses.append([])
        for _ in range(10):
            loss = nn.functional.cross_entropy(call(tokens).flatten(0, 1), (tokens * 3 % 11).flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    plain, ours = losses
    assert plain[-1] < 0.8 * plain[0]
    assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_random_parameters_equal_mhc_by_hand(device, autocast):
    """Outputs and every gradient in float64; with autocast the streams stay float32, branches are
    bfloat16.
    """
    tokens = (torch.arange(2 * LENGTH).reshape(2, LENGTH) * 5 % 7).to(device)
    model = made(Transformer, 2, device="cpu")
    mhc_compile.attach(model, tokens.cpu())
    stir(model, torch.Generator().manual_seed(2))
    model.to(device)
    with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
        got = torch.compile(model, backend="mhc")(tokens)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(3)).to(device)
    (got * weight).sum().backward()
    values = values_of(model)
    want = transformer_by_hand(values, tokens, model.gain)
    (want * weight).sum().backward()
    output, gradient = (3e-2, 1e-1) if autocast else (1e-5, 1e-4)
    assert (got - want).norm() < output * want.norm()
    for name, parameter in model.named_parameters():
        wanted = values[name].grad
        assert (parameter.grad - wanted).norm() < gradient * wanted.norm() + 1e-6, name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_equals_eager_mode_in_float64(device, preset):
    options = {"preset": preset, "init": "random"}
    model = made(Net, 1, device="cpu").double()
    mhc_compile.attach(model, inputs("cpu").double(), options=options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mhc" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    x = inputs("cpu")
    want = mhc_compile.eager(model, options=options)(x.double())
    want.square().mean().backward()
    wanted = {name: value.grad for name, value in model.named_parameters()}
    other = made(Net, 1, device="cpu")
    mhc_compile.attach(other, x, options=options)
    other.load_state_dict(model.state_dict())
    other.to(device)
    got = torch.compile(other, backend="mhc", options=options)(x.to(device))
    got.square().mean().backward()
    assert (got.cpu() - want).norm() < 1e-5 * want.norm()
    for name, parameter in other.named_parameters():
        if wanted[name] is not None and wanted[name].numel():
            assert (parameter.grad.cpu() - wanted[name]).norm() < 1e-4 * wanted[name].norm() + 1e-7, name


def test_other_lengths_after_the_first(device):
    """A batch of another length, and a single token as in generation."""
    plain, model = made(Net, device=device), made(Net, device=device)
    call = torch.compile(model, backend="mhc")
    for length in (LENGTH, 17, 1):
        x = inputs(device, length)
        got, want = call(x), plain(x)
        assert (got - want).norm() < 1e-5 * want.norm(), length


@pytest.mark.parametrize("strict", [False, True])
def test_two_trainings_have_the_same_bits(device, strict):
    torch.use_deterministic_algorithms(strict)
    try:
        one, other = trained(device, 3), trained(device, 3)
    finally:
        torch.use_deterministic_algorithms(False)
    same(one, other, rtol=0, atol=0)
    assert one[0][0] != one[0][-1]


def test_reduce_overhead_equals_training_without(device):
    want = trained(device, 4)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    got = trained(device, 4, mode="reduce-overhead")  # runs, is recorded, is replayed twice
    if device == "cuda":  # on CPU there are none
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped
    same(got, want, rtol=1e-5, atol=1e-6)


def test_capture_by_hand_and_replay(cuda):
    model = made(Net, device=cuda)
    call, x = compiled(model), inputs(cuda)

    def gradients():
        loss = call(x).square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients()
            model.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = gradients()
    caught = [parameter.grad for parameter in model.parameters()]
    for seed in (1, 2):
        x.copy_(inputs(cuda, seed=seed))
        graph.replay()
        got = [held.detach().clone(), *(grad.clone() for grad in caught)]
        model.zero_grad()
        want = [gradients().detach(), *(parameter.grad for parameter in model.parameters())]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_does_not_wait_for_the_device(cuda):
    model = made(Net, device=cuda)
    training = Training(compiled(model), model, inputs(cuda))
    training.run(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=cuda).item()  # the mode works
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def memory():
    """Bytes of the device, and of the process."""
    gc.collect()
    device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    with open("/proc/self/statm") as file:
        return device, int(file.read().split()[1]) * resource.getpagesize()


def test_memory_does_not_grow(device):
    """A thousand steps. What is kept for every launch, of some kB a step, would be seen."""
    model = made(Net, device=device)
    training = Training(compiled(model), model, inputs(device))
    for _ in range(200):
        training.step()
    before = memory()
    for _ in range(1000):
        training.step()
    after = memory()
    assert after[0] == before[0]
    assert after[1] - before[1] < 4 << 20


def test_a_model_on_another_device_than_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for inner in ("inductor", "aot_eager"):
        torch._dynamo.reset()
        with torch.cuda.device(0):
            one, other = (trained(name, 2, options={"inner_backend": inner}) for name in ("cuda:1", "cuda:0"))
        assert torch.allclose(one[0].cpu(), other[0].cpu(), rtol=1e-5)
