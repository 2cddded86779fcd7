"""The models that are measured, and one round of each: a forward, a backward, an optimizer step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mhc_compile.tools.bench.sites import Residual, Shape, StreamEnds

#: Sites that the benchmark of one site runs in turn, each with its own tensors.
SITES = 8


class _Attention(nn.Module):
    """Layer norm, causal attention, projection: [1, T, C] to [1, T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    """Layer norm, 4C, GELU, C: [1, T, C] to [1, T, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two sites: `x + attn(x)`, then `x + mlp(x)`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = _Attention(width, heads), _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both branches with plain residual adds."""
        x = x + self.attn(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class PlainModel(nn.Module):
    """GPT-2 in shape: embeddings, blocks with plain residual adds, tied head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.to(device=shape.device, dtype=shape.real)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy in nats, a float32 scalar, of ids `targets` after `tokens`."""
        x = self.trunk(self.embedding(tokens) + self.positions.weight)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def trunk(self, x: Tensor) -> Tensor:
        """Run the blocks: [1, T, C] to [1, T, C]."""
        for block in self.blocks:
            x = block(x)
        return x


class StreamsModel(PlainModel):
    """The same blocks on streams; a seed gives them the same weights as in the plain model.

    `connect` builds a residual connection for every site, in order, and the ends of the streams.
    """

    def __init__(self, shape: Shape, connect: Callable[[Shape, int], tuple[Iterable[Residual], StreamEnds]]) -> None:
        super().__init__(shape)
        sites, ends = connect(shape, shape.sites)
        self.sites, self.ends = nn.ModuleList(sites).to(shape.device), ends.to(shape.device)

    def trunk(self, x: Tensor) -> Tensor:
        """Run the branches of the blocks on streams: [1, T, C] to [1, T, C]."""
        streams = self.ends.enter(x)
        sites = iter(self.sites)
        for block in self.blocks:
            for branch in block.children():
                site: Any = next(sites)
                h, held = site.read(streams)
                streams = site.write(branch(h), *held)
        return self.ends.leave(streams)


def batch(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, int64 [1, T], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(shape.vocabulary, (1, shape.tokens + 1), generator=generator).to(shape.device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


@dataclass(frozen=True)
class Times:
    """Seconds of one site or one step. `total` includes the optimizer's step where there is one.

    `host` is how long the host took to enqueue it all: on CUDA a `total` near it is the host's, not
    the device's.
    """

    forward: float
    backward: float
    total: float
    host: float = 0.0


class Workload:
    """One candidate in one benchmark. Figures are divided by `repeats`, equal parts of a run."""

    def __init__(self, device: str, repeats: int = 1) -> None:
        self.device, self.repeats = device, repeats

    def forward(self) -> Any:
        """Return the argument of `backward`."""
        raise NotImplementedError

    def backward(self, outputs: Any) -> None:
        """Compute gradients, where there are any."""

    def finish(self) -> None:
        """Run the part of a step that follows the backward; timed."""

    def clear(self) -> None:
        """Free the gradients; not timed. No candidate keeps them while the others run."""

    def run(self) -> None:
        """Run once, untimed."""
        self.backward(self.forward())
        self.finish()
        self.clear()

    def timed(self) -> Times:
        """Run once. On CUDA events in the stream mark the ends of the parts; nothing waits within.

        There an untimed run goes ahead, as in a loop of training: while the device computes it, the
        host enqueues the timed one. The host waits for the device at the end alone.
        """
        if self.device == "cuda":
            self.run()
        start = time.perf_counter()
        marks = [self._mark()]
        outputs = self.forward()
        marks.append(self._mark())
        self.backward(outputs)
        marks.append(self._mark())
        self.finish()
        marks.append(self._mark())
        host = time.perf_counter() - start
        self.synchronize()
        del outputs
        self.clear()
        begin, forward, backward, end = marks
        spans = self._seconds(begin, forward), self._seconds(forward, backward), self._seconds(begin, end), host
        return Times(*(span / self.repeats for span in spans))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _mark(self) -> Any:
        """Return a point in time: on CUDA an event, which the stream will reach."""
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self.device == "cuda" else end - begin  # type: ignore[no-any-return]


class SiteWorkload(Workload):
    """Sites as in a model: all forwards in order, then all backwards in reverse.

    Each site has its own tensors, too many for a cache. Every output receives a gradient, every
    input and parameter gives one: `gradients`, of the latest site. They are not accumulated in
    `grad`, which would copy those that a site merely passes on. All sites share their parameters.
    """

    def __init__(
        self, device: str, call: Callable[..., Any], module: nn.Module, inputs: Sequence[tuple[Tensor, ...]]
    ) -> None:
        super().__init__(device, len(inputs))
        self._call, self._inputs, self._parameters = call, inputs, tuple(module.parameters())
        self._incoming: list[list[Tensor]] = []
        self.gradients: tuple[Tensor, ...] = ()

    def forward(self) -> list[tuple[Tensor, ...]]:
        """Return the outputs of every site."""
        return [self._call(*site) for site in self._inputs]

    def backward(self, outputs: list[tuple[Tensor, ...]]) -> None:
        """Start from the same random gradients at every call; empty `outputs` to free memory."""
        if not self._incoming:
            self._incoming = [[torch.randn_like(tensor) for tensor in site] for site in outputs]
        for site, incoming in zip(reversed(self._inputs), reversed(self._incoming), strict=True):
            self.gradients = torch.autograd.grad(outputs.pop(), (*site, *self._parameters), incoming)

    def clear(self) -> None:
        """Free the gradients."""
        self.gradients = ()


class ForwardWorkload(Workload):
    """A forward pass of `call(*inputs)` without gradients."""

    def __init__(self, device: str, call: Callable[..., Any], inputs: tuple[Any, ...] = ()) -> None:
        super().__init__(device)
        self._call, self._inputs = call, inputs

    @torch.no_grad()
    def forward(self) -> Any:
        """Return what the call returns."""
        return self._call(*self._inputs)


class StepWorkload(Workload):
    """One training step of `model`: `call(*inputs)` is its loss (in nats), gradients, AdamW."""

    def __init__(
        self,
        device: str,
        call: Callable[..., Any],
        model: nn.Module,
        inputs: tuple[Any, ...],
        fused: bool | None = True,
    ) -> None:
        super().__init__(device)
        self._call, self._inputs = call, inputs
        # Built before the first call, as in scripts; the backend adds its parameters to it.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
        self._loss = torch.tensor(float("nan"))

    @property
    def loss(self) -> float:
        """The loss of the last step. Reading it waits for the device."""
        return float(self._loss)

    def forward(self) -> Tensor:
        """Return the loss."""
        return self._call(*self._inputs)  # type: ignore[no-any-return]

    def backward(self, outputs: Tensor) -> None:
        """Differentiate the loss."""
        outputs.backward()
        self._loss = outputs.detach()

    def finish(self) -> None:
        """Update the parameters."""
        self.optimizer.step()

    def clear(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad()
