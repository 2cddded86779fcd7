"""Sequences and graphs: dilated convolutions, recurrences, conformers, message passing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_compile.tools.zoo.families.parts import WIDTH, Attention, FeedForward, vectors
from mhc_compile.tools.zoo.family import Case, Expected, Family, Mode, chains, no_chain

__all__ = ["FAMILIES"]


class WaveNet(nn.Module):
    """Gated dilated convolutions: `x + r(z)` is the trunk, and the sum of all `s(z)` the output, which is no trunk."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.out = nn.Conv1d(1, WIDTH, 1), nn.Conv1d(WIDTH, 4, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(WIDTH, 2 * WIDTH, 2, dilation=2**layer) for layer in range(layers))
        self.residual, self.skip = (nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(layers)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.into(x), torch.zeros(())
        for layer, (dilated, residual, skip) in enumerate(zip(self.dilated, self.residual, self.skip, strict=True)):
            a, b = dilated(F.pad(x, (2**layer, 0))).chunk(2, dim=1)
            z = torch.tanh(a) * torch.sigmoid(b)
            x = x + residual(z)
            total = total + skip(z)
        return self.out(F.relu(total)) + self.out(x)


class TemporalBlock(nn.Module):
    """TCN: `relu(skip + f(x))`, causal by cutting the tail, the skip a 1 × 1 convolution where the width changes."""

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


class Conformer(nn.Module):
    """Half MLP, attention, convolution, half MLP, norm: four sites, two of them with half the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.attn = FeedForward(), FeedForward(), Attention()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.wide, self.depthwise = (
            nn.Conv1d(WIDTH, 2 * WIDTH, 1),
            nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False),
        )
        self.batch_norm, self.narrow = nn.BatchNorm1d(WIDTH), nn.Conv1d(WIDTH, WIDTH, 1)

    def _convolve(self, x: Tensor) -> Tensor:
        h = F.glu(self.wide(self.norm2(x).transpose(1, 2)), dim=1)
        return self.narrow(F.silu(self.batch_norm(self.depthwise(h)))).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        x = x + self.attn(self.norm1(x))
        x = x + self._convolve(x)
        return self.norm3(x + 0.5 * self.last(x))


class GatedRecurrence(nn.Module):
    """A linear recurrence written step by step in the branch: its additions are no residual adds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.decay, self.out = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        u, decay = self.into(h), torch.sigmoid(self.decay(h))
        state, states = torch.zeros_like(u[:, 0]), []
        for step in range(u.shape[1]):
            state = decay[:, step] * state + (1 - decay[:, step]) * u[:, step]
            states.append(state)
        return x + self.out(torch.stack(states, dim=1))


class GraphConvolution(nn.Module):
    """`x + relu(A norm(x) W)` on nodes [N, C], A the normalised adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return x + F.relu(adjacency @ self.weight(self.norm(x)))


class ScatterConvolution(GraphConvolution):
    """The same on an edge list: messages are gathered, weighed and added up by `index_add`."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        messages = self.weight(self.norm(x))[edges[0]]
        return x + torch.zeros_like(x).index_add(0, edges[1], F.relu(messages))


class Nodes(nn.Module):
    """Blocks on a graph."""

    def __init__(self, kind: type[GraphConvolution], layers: int) -> None:
        super().__init__()
        self.into, self.blocks, self.out = (
            nn.Linear(8, WIDTH),
            nn.ModuleList(kind() for _ in range(layers)),
            nn.Linear(WIDTH, 4),
        )

    def forward(self, x: Tensor, structure: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x, structure)
        return self.out(x)


class GatedMerge(nn.Module):
    """A GRU cell merges the branch into the trunk: there is no add."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.cell = FeedForward(), nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.mlp(x).flatten(0, 1), x.flatten(0, 1)).view_as(x)


class Decomposed(nn.Module):
    """Autoformer: behind every add the moving average of the trunk is taken off, `x - mean of its neighbours`."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.average = FeedForward(norm=False), nn.AvgPool1d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        return x - self.average(x.transpose(1, 2)).transpose(1, 2)


class ResidualLSTM(nn.Module):
    """`x + lstm(x)`. Dynamo hands no LSTM to a backend: there is no graph at all."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.out(x)


def _tcn(layers: int) -> Case:
    blocks = [TemporalBlock(3 if layer == 0 else WIDTH, 2**layer) for layer in range(layers + 1)]
    return nn.Sequential(*blocks), (torch.randn(2, 3, 12),), {}


def _unseen(layers: int, mode: Mode) -> Expected:  # noqa: ARG001
    return Expected(note="Dynamo runs recurrent layers eagerly")


_ONE = chains(lambda n: (n,))
_EDGES = ((0, 1, 2, 3, 4, 5, 0), (1, 2, 3, 4, 5, 0, 3))
_GROUP = "sequences"
FAMILIES: tuple[Family, ...] = (
    Family("wavenet", _GROUP, lambda n: (WaveNet(n), (torch.randn(2, 1, 12),), {}), _ONE),
    Family("tcn", _GROUP, _tcn, chains(lambda n: (n,), projected=1)),
    Family("gated-merge", _GROUP, vectors(GatedMerge), chains(no_chain)),
    Family("decomposed", _GROUP, vectors(Decomposed), _ONE),
    Family("conformer", _GROUP, vectors(Conformer), chains(lambda n: (4 * n,))),
    Family("gated-recurrence", _GROUP, vectors(GatedRecurrence), _ONE),
    Family(
        "gcn",
        _GROUP,
        lambda n: (Nodes(GraphConvolution, n), (torch.randn(6, 8), torch.rand(6, 6).softmax(-1)), {}),
        _ONE,
    ),
    Family(
        "gcn-scatter",
        _GROUP,
        lambda n: (Nodes(ScatterConvolution, n), (torch.randn(6, 8), torch.tensor(_EDGES)), {}),
        _ONE,
    ),
    Family("residual-lstm", _GROUP, lambda n: (ResidualLSTM(n), (torch.randn(2, 6, 8),), {}), _unseen),
)
