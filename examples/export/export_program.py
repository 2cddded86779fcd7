"""Export a model with dynamic shapes, rewrite the program, save it, load it, and train it."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import mhc_compile

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--steps", type=int, default=100)
arguments = parser.parse_args()

torch.manual_seed(0)
width = arguments.width
layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, norm_first=True, batch_first=True)
model = nn.TransformerEncoder(layer, arguments.layers, nn.LayerNorm(width), enable_nested_tensor=False)
x = torch.randn(8, 32, width)

program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch"), 1: Dim("time")},))
rewritten = mhc_compile.rewrite(program)

new = [name for name in rewritten.graph_signature.parameters if name not in program.graph_signature.parameters]
print(f"{len(new) // 3} sites: {new[0]}, ..., {new[-1]}")
print(f"largest difference: {(program.module()(x) - rewritten.module()(x)).abs().max():.1e}")

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "encoder.pt2"
    torch.export.save(rewritten, file)
    loaded = torch.export.load(file)  # needs torch and nothing else

operators = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
print(f"operators that are not ATen's: {sorted(name for name in operators if 'mhc' in name) or 'none'}")

# Train on sequences of another length than that of the example inputs.
train = loaded.module()
optimizer = torch.optim.Adam(train.parameters(), lr=1e-3)
for step in range(arguments.steps):
    phase = torch.rand(16, 1, width) * 6
    clean = torch.sin(phase + torch.linspace(0, 6, 48)[None, :, None])
    loss = F.mse_loss(train(clean + 0.5 * torch.randn_like(clean)), clean)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, arguments.steps - 1):
        print(f"step {step + 1:4d}  loss {loss.item():.4f}")

total = sum(loaded.state_dict[name].numel() for name in new if name.endswith("phi"))
trained = dict(train.named_parameters())
moved = sum(int(trained[name].count_nonzero()) for name in new if name.endswith("phi"))
print(f"entries of phi that are no longer zero: {moved / total:.0%}")
