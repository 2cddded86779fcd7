"""Sequences and graphs: dilated convolutions, recurrences, conformers, message passing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import (  # isort: skip
    INTO, OUT, WIDTH, Attention, Block, Each, FeedForward, Framed, Norm, Plain, Square, network, spelled, vectors, wired,
)  # fmt: skip
from mhc_compile.tools.zoo.family import Case, Family, chains, per_layer

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """TCN: `relu(skip + f(x))`, made causal by a cut; the skip is a convolution at a new width."""

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


def _gated_recurrence(block: Any, x: Tensor) -> Tensor:
    """Compute a linear recurrence in the branch: its additions are no residual adds."""
    h = block.norm(x)
    u, decay = block.into(h), torch.sigmoid(block.decay(h))
    state, states = torch.zeros_like(u[:, 0]), []
    for step in range(u.shape[1]):
        state = decay[:, step] * state + (1 - decay[:, step]) * u[:, step]
        states.append(state)
    return x + block.out(torch.stack(states, dim=1))


class GraphConvolution(Block, norm=Norm, weight=Square):
    """`x + relu(A norm(x) W)` on nodes [N, C], A the normalised adjacency."""

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return x + F.relu(adjacency @ self.weight(self.norm(x)))


class ScatterConvolution(GraphConvolution):
    """Graph convolution on an edge list: messages are weighted and added by `index_add`."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        messages = self.weight(self.norm(x))[edges[0]]
        return x + torch.zeros_like(x).index_add(0, edges[1], F.relu(messages))


def _decomposed(block: Any, x: Tensor) -> Tensor:
    """Autoformer: subtracts from the trunk its moving average after every add."""
    x = x + block.mlp(x)
    return x - block.average(x.transpose(1, 2)).transpose(1, 2)


def _residual_lstm(net: Any, x: Tensor) -> Tensor:
    """`x + lstm(x)`. Dynamo runs an LSTM outside its graphs: there is no graph at all."""
    x = net.into(x)
    for layer in net.layers:
        x = x + layer(x)[0]
    return net.out(x)


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
        Family("tcn", network(_tcn, (2, 3, 12)), _ONE),
        spelled("gated-merge", lambda block, x: block.cell(block.mlp(x).flatten(0, 1), x.flatten(0, 1)).view_as(x),
                doc="A GRU cell merges the branch into the trunk: there is no add.", expected=per_layer(),
                mlp=FeedForward, cell=partial(nn.GRUCell, WIDTH, WIDTH)),
        spelled("decomposed", _decomposed, mlp=Plain, average=partial(nn.AvgPool1d, 3, 1, 1)),
        Family("conformer", vectors(Conformer), per_layer(4)),
        spelled("gated-recurrence", _gated_recurrence, norm=Norm, into=Square, decay=Square, out=Square),
        Family("gcn", _nodes(GraphConvolution, lambda: torch.rand(6, 6).softmax(-1)), _ONE),
        Family("gcn-scatter", _nodes(ScatterConvolution, lambda: torch.tensor(_EDGES)), _ONE),
        wired("residual-lstm", _residual_lstm, (2, 6, 8), expected=_UNSEEN, into=INTO, out=OUT,
              layers=Each(partial(nn.LSTM, WIDTH, WIDTH, batch_first=True))),
    ),
}  # fmt: skip
