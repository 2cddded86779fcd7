"""Compare a model that Dynamo cuts into several graphs with the same model in one graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mhc_compile


@torch.compiler.disable
def record(x: Tensor, norms: list[float]) -> None:
    norms.append(x.detach().norm().item())  # ordinary Python: a graph ends before it


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.recorded: list[float] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        if self.recorded is not None:
            record(x, self.recorded)
        return x + self.mlp(x)


graphs = 0


def count(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:  # noqa: ARG001
    global graphs
    graphs += 1
    return graph_module


torch.manual_seed(0)
model, x = nn.Sequential(*(Block(32) for _ in range(3))), torch.randn(2, 8, 32)
options = {"inner_backend": count, "strict": True}  # strict: a place where streams end is an error
for connection in mhc_compile.attach(model, x, options=options).values():
    nn.init.normal_(connection.phi)  # streams that differ, as after training
compiled = torch.compile(model, backend="mhc", options=options)

whole = compiled(x)
print(f"without breaks: {graphs} graph")
graphs = 0
for block in model:
    block.recorded = []
pieces = compiled(x)
print(f"with breaks: {graphs} graphs, {len(mhc_compile.connections(model))} hyper-connections")
print(f"largest difference: {(whole - pieces).abs().max().item():.1e}")
