"""Define a residual mapping: H_res as a weighted mean of cyclic shifts, with n logits."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhc_compile

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--inner-backend", default="inductor", help='the compiler: "inductor", "aot_eager" or "eager"')
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=64)
arguments = parser.parse_args()


class Circulant(mhc_compile.ResidualMapping):
    """H_ij = softmax(z)_k with k = j - i modulo n: a circulant matrix."""

    name = "circulant"

    def logits(self, n: int) -> int:
        return n

    def init_preserve(self, n: int) -> Tensor:
        return 4.0 * (torch.arange(n) == 0)  # H_ii = 0.95 at n = 4; the softmax is not saturated

    def matrix(self, logits: Tensor, n: int, iterations: int) -> Tensor:  # noqa: ARG002
        weights = torch.softmax(logits, -1)
        return torch.stack([weights.roll(i, -1) for i in range(n)], -2)


mhc_compile.register_mapping(Circulant())

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(
    arguments.width, 4, 2 * arguments.width, dropout=0.0, batch_first=True, norm_first=True
)
model = nn.Sequential(
    nn.Embedding(32, arguments.width),
    nn.TransformerEncoder(layer, arguments.layers, enable_nested_tensor=False),
    nn.Linear(arguments.width, 32),
)
tokens = torch.randint(32, (16, 16))
before = model(tokens)
compiled = torch.compile(
    model, backend="mhc", options={"mapping": "circulant", "inner_backend": arguments.inner_backend}
)
print(f"largest difference at the start: {(compiled(tokens) - before).abs().max().item():.1e}")

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(arguments.steps):
    tokens = torch.randint(32, (16, 16))
    loss = F.cross_entropy(compiled(tokens).flatten(0, 1), tokens.amax(1, keepdim=True).expand_as(tokens).flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, arguments.steps - 1):
        print(f"step {step + 1:4d}  loss {loss.item():.4f}")

path, connection = list(mhc_compile.connections(model).items())[-1]
*_, res = connection.coefficients(torch.randn(1, 4, arguments.width))
print(
    f"{path}: H_ii {res[0].diagonal().mean().item():.3f}, columns sum to {[round(x, 4) for x in res[0].sum(0).tolist()]}"
)
