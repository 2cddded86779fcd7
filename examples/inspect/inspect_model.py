"""Ask a model, from Python, what the commands ask: explain, why, diff, check and stability."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from torch import nn

import mhc_compile

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--inner-backend", default="inductor", help='the compiler: "inductor", "aot_eager" or "eager"')
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=64)
arguments = parser.parse_args()
show = Console().print  # every result has a rich form

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(arguments.width, 4, 4 * arguments.width, norm_first=True, batch_first=True)
model = nn.TransformerEncoder(layer, arguments.layers, enable_nested_tensor=False)
batch = torch.randn(2, 16, arguments.width)
options = {"inner_backend": arguments.inner_backend}

show(mhc_compile.explain(model, batch, options=options))  # traces; nothing runs, nothing changes
show(mhc_compile.why(model, batch, node="layers.0.mhc.linear2", options=options))
show(mhc_compile.diff(model, batch, options=options, stage="plan"))

result = mhc_compile.check(model, batch, options=options)  # runs copies, forward and backward
show(result)
assert result.ok, result.findings

mhc_compile.attach(model, batch, options=options)
show(mhc_compile.stability(model, batch, options=options))  # runs once, without gradients
