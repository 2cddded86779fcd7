"""Register a preset: one system's choices under one name."""

from __future__ import annotations

import argparse

import torch
from torch import nn

import mhc_compile
from mhc_compile.config.coefficient_spec import Convention
from mhc_compile.config.presets import Preset, register_preset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--inner-backend", default="inductor", help='the compiler: "inductor", "aot_eager" or "eager"')
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=64)
arguments = parser.parse_args()

register_preset(
    Preset(
        name="house-style",
        source="this file",
        convention=Convention(mapping="kronecker", pre_eps=1e-6),  # pre = sigmoid(...) + 1e-6
        eps=1e-5,
        read_out="learned",
    )
)

torch.manual_seed(0)
width = arguments.width
layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
model = nn.TransformerEncoder(layer, arguments.layers, enable_nested_tensor=False)
x = torch.randn(8, 16, width)
before = model(x)

options = {
    "preset": "house-style",
    "overrides": {"layers.0.*": {"mapping": "identity"}},  # the first block does not mix its streams
    "inner_backend": arguments.inner_backend,
}
after = torch.compile(model, backend="mhc", options=options)(x)
print(f"largest difference at the start: {(after - before).abs().max().item():.1e}")
for path, connection in mhc_compile.connections(model).items():
    print(f"{path}: {connection.mapping}, phi {list(connection.phi.shape)}")
