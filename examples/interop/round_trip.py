"""Export a model to DeepSeek-V4's names and layout, and import it again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile import interop

PRESET, WIDTH = "deepseek-v4", 32
OPTIONS = {"preset": PRESET, "inner_backend": "eager"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.self_attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(Block() for _ in range(2)), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def build(x: Tensor) -> nn.Module:
    model = Model()
    mhc_compile.attach(model, x, options=OPTIONS)
    return model


torch.manual_seed(0)
x = torch.randn(2, 8, WIDTH)
model = build(x)
for connection in mhc_compile.connections(model).values():
    nn.init.normal_(connection.phi)

native = interop.export_state_dict(model, PRESET)
for name, tensor in native.items():
    if "hc" in name and "layers.1" not in name:
        print(f"{name:30} {list(tensor.shape)}")

other = build(x)
interop.import_state_dict(other, native, PRESET)
outputs = [torch.compile(m, backend="mhc", options=OPTIONS)(x) for m in (model, other)]
print(f"the same output to the last bit: {torch.equal(*outputs)}")

back = interop.from_native(native, PRESET)
state = model.state_dict()
print(f"the same state dict to the last bit: {all(torch.equal(back[name], state[name]) for name in state)}")
