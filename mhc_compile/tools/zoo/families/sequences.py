"""Sequences and graphs: dilated convolutions, recurrences, conformers, message passing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, OUT, WIDTH, Attention, Block, Each, FeedForward, Framed, Norm, Plain, Square, network, spelled, vectors,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Case, Family, chains, per_layer

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FAMILIES"]

_conv = partial(partial, nn.Conv1d)


class WaveNet(nn.Module):
    """Gated dilated convolutions: `x + r(z)` is the trunk, the sum of all `s(z)` the output."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.out = nn.Conv1d(1, WIDTH, 1), nn.Conv1d(WIDTH, 4, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(WIDTH, 2 * WIDTH, 2, dilation=2**layer) for layer in range(layers))
        self.residual, self.skip = (Each(_conv(WIDTH, WIDTH, 1))(layers) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.into(x), torch.zeros(())
        for layer, (dilated, residual, skip) in enumerate(zip(self.dilated, self.residual, self.skip, strict=True)):
            a, b = dilated(F.pad(x, (2**layer, 0))).chunk(2, dim=1)
            z = torch.tanh(a) * torch.sigmoid(b)
            x = x + residual(z)
            total = total + skip(z)
        return self.out(F.relu(total)) + self.out(x)


class TemporalBlock(nn.Module):
    """TCN: `relu(skip + f(x))`, causal by a cut; the skip is a convolution where the width changes."""

    def __init__(self, into: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv1 = nn.Conv1d(into, WIDTH, 3, padding=self.pad, dilation=dilation)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, padding=self.pad, dilation=dilation)
        self.match = nn.Conv1d(into, WIDTH, 1) if into != WIDTH else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[..., : -self.pad])
        y = F.relu(self.conv2(y)[..., : -self.pad])
        return F.relu(y + (x if self.match is None else self.match(x)))


class Conformer(
    Block, first=FeedForward, last=FeedForward, attn=Attention, norm1=Norm, norm2=Norm, norm3=Norm,
    wide=_conv(WIDTH, 2 * WIDTH, 1), depthwise=_conv(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False),
    batch_norm=partial(nn.BatchNorm1d, WIDTH), narrow=_conv(WIDTH, WIDTH, 1),
):  # fmt: skip
    """Half an MLP, attention, convolution, half an MLP, norm: four sites."""

    def _convolve(self, x: Tensor) -> Tensor:
        h = F.glu(self.wide(self.norm2(x).transpose(1, 2)), dim=1)
        return self.narrow(F.silu(self.batch_norm(self.depthwise(h)))).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        x = x + self.attn(self.norm1(x))
        x = x + self._convolve(x)
        return self.norm3(x + 0.5 * self.last(x))


class GatedRecurrence(Block, norm=Norm, into=Square, decay=Square, out=Square):
    """A linear recurrence in the branch, step by step: its additions are no residual adds."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        u, decay = self.into(h), torch.sigmoid(self.decay(h))
        state, states = torch.zeros_like(u[:, 0]), []
        for step in range(u.shape[1]):
            state = decay[:, step] * state + (1 - decay[:, step]) * u[:, step]
            states.append(state)
        return x + self.out(torch.stack(states, dim=1))


class GraphConvolution(Block, norm=Norm, weight=Square):
    """`x + relu(A norm(x) W)` on nodes [N, C], A the normalised adjacency."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return x + F.relu(adjacency @ self.weight(self.norm(x)))


class ScatterConvolution(GraphConvolution):
    """A graph convolution on an edge list: messages are gathered, weighted and added by `index_add`."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        messages = self.weight(self.norm(x))[edges[0]]
        return x + torch.zeros_like(x).index_add(0, edges[1], F.relu(messages))


class Decomposed(Block, mlp=Plain, average=partial(nn.AvgPool1d, 3, 1, 1)):
    """Autoformer: after every add the trunk loses its moving average, `x - mean of its neighbours`."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        return x - self.average(x.transpose(1, 2)).transpose(1, 2)


class ResidualLSTM(Block, into=INTO, out=OUT, layers=Each(partial(nn.LSTM, WIDTH, WIDTH, batch_first=True))):
    """`x + lstm(x)`. Dynamo runs an LSTM outside its graphs: there is no graph at all."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.out(x)


def _tcn(layers: int) -> nn.Module:
    return nn.Sequential(*(TemporalBlock(WIDTH if layer else 3, 2**layer) for layer in range(layers + 1)))


def _nodes(kind: type[nn.Module], structure: Callable[[], Tensor]) -> Callable[[int], Case]:
    """Return a function that makes blocks on a graph of six nodes."""
    return lambda n: (Framed([kind() for _ in range(n)]), (torch.randn(6, 8), structure()), {})


_ONE, _UNSEEN = per_layer(1), chains(lambda _: (), note="Dynamo runs recurrent layers eagerly")
_EDGES = ((0, 1, 2, 3, 4, 5, 0), (1, 2, 3, 4, 5, 0, 3))
FAMILIES: dict[str, tuple[Family, ...]] = {
    "sequences": (
        Family("wavenet", network(WaveNet, (2, 1, 12)), _ONE),
        Family("tcn", network(_tcn, (2, 3, 12)), per_layer(1, projected=1)),
        spelled("gated-merge", "A GRU cell merges the branch into the trunk: there is no add.",
                lambda block, x: block.cell(block.mlp(x).flatten(0, 1), x.flatten(0, 1)).view_as(x), expected=per_layer(),
                mlp=FeedForward, cell=partial(nn.GRUCell, WIDTH, WIDTH)),
        Family("decomposed", vectors(Decomposed), _ONE),
        Family("conformer", vectors(Conformer), per_layer(4)),
        Family("gated-recurrence", vectors(GatedRecurrence), _ONE),
        Family("gcn", _nodes(GraphConvolution, lambda: torch.rand(6, 6).softmax(-1)), _ONE),
        Family("gcn-scatter", _nodes(ScatterConvolution, lambda: torch.tensor(_EDGES)), _ONE),
        Family("residual-lstm", network(ResidualLSTM, (2, 6, 8)), _UNSEEN),
    ),
}  # fmt: skip
