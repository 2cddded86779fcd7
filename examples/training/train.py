"""Train a small GPT-2 on the standard library's sources, with the backend of your choice."""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from mhc_compile.tools.demo.data import load_corpus

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--backend", default="mhc", help='of torch.compile: "inductor" is the residual model, "mhc" has hyper-connections'
)
parser.add_argument("--options", type=json.loads, help='of torch.compile, as JSON: {"streams": 2}')
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--context", type=int, default=128)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=128)
arguments = parser.parse_args()

corpus = load_corpus()
torch.manual_seed(0)
config = GPT2Config(
    vocab_size=256,
    n_positions=arguments.context,
    n_embd=arguments.width,
    n_layer=arguments.layers,
    n_head=arguments.width // 32,
    bos_token_id=0,
    eos_token_id=0,
    use_cache=False,
)
model = GPT2LMHeadModel(config)
compiled = torch.compile(model, backend=arguments.backend, options=arguments.options)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
data = torch.Generator().manual_seed(0)

for step in range(arguments.steps):
    begin = time.perf_counter()
    window = corpus.train.windows(arguments.batch, arguments.context + 1, data)
    logits = compiled(window[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, arguments.steps - 1) or (step + 1) % 50 == 0:
        print(f"step {step + 1:5d}  loss {loss.item():.4f}  {time.perf_counter() - begin:.2f} s")

trained = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
print(f"{arguments.backend}: the optimizer trains {trained:,} parameters")
