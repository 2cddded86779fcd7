"""Train a small transformer to repeat tokens. It is compiled, and no backend is named."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACK = 4

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--lr", type=float, default=1e-3)
arguments = parser.parse_args()


class Model(nn.Module):
    def __init__(self, vocabulary: int = 32, length: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, arguments.width)
        self.position = nn.Embedding(length, arguments.width)
        layer = nn.TransformerEncoderLayer(
            arguments.width, 4, 4 * arguments.width, dropout=0.0, norm_first=True, batch_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, arguments.layers, enable_nested_tensor=False)
        self.head = nn.Linear(arguments.width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr)
compiled = torch.compile(model)

for step in range(arguments.steps):
    tokens = torch.randint(32, (16, 32))
    logits = compiled(tokens)
    loss = F.cross_entropy(logits[:, BACK:].flatten(0, 1), tokens[:, :-BACK].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, arguments.steps // 2 - 1, arguments.steps - 1):
        print(f"step {step + 1:4d}  loss {loss.item():.4f}")

print(
    f"the optimizer trains {sum(p.numel() for group in optimizer.param_groups for p in group['params']):,} parameters"
)
