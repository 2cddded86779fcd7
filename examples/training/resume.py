"""Train a model, resumably: killed at any moment and started again, it continues bit for bit."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import mhc_compile

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--checkpoint", type=Path, default=Path("resume.pt"))
parser.add_argument("--options", type=json.loads, default={}, help='of torch.compile, as JSON: {"streams": 2}')
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--save-every", type=int, default=20)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=64)
arguments = parser.parse_args()


def save(path: Path, content: dict[str, object]) -> None:
    """Write all or nothing: a process that is killed here leaves the previous checkpoint intact."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # or the new name may reach the disk before the content does
    os.replace(temporary, path)


def batch(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return smooth sequences with noise, and without."""
    clean = torch.sin(torch.rand(8, 1, width) * 6 + torch.linspace(0, 6, 32)[None, :, None])
    return clean + 0.5 * torch.randn_like(clean), clean


torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(arguments.width, 4, 4 * arguments.width, norm_first=True, batch_first=True)
model = nn.TransformerEncoder(layer, arguments.layers, nn.LayerNorm(arguments.width), enable_nested_tensor=False)
compiled = torch.compile(model, backend="mhc", options=arguments.options)

# The parameters must exist before an optimizer is built and before a checkpoint is loaded.
mhc_compile.attach(model, torch.zeros(8, 32, arguments.width), options=arguments.options)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))

start = 0
if arguments.checkpoint.exists():
    state = torch.load(arguments.checkpoint, weights_only=True)
    mhc_compile.load_state_dict(model, state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])  # of the data and of dropout
    start = state["step"]
    print(f"resumed at step {start}", flush=True)

for step in range(start + 1, arguments.steps + 1):
    noisy, clean = batch(arguments.width)
    loss = F.mse_loss(compiled(noisy), clean)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    print(f"step {step:4d}  loss {loss.item():.9f}", flush=True)
    if step % arguments.save_every == 0 or step == arguments.steps:
        save(
            arguments.checkpoint,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": torch.get_rng_state(),
                "step": step,
            },
        )
