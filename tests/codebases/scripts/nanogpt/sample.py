"""Sample from a checkpoint in the order of nanoGPT's sample.py."""

import os
from pathlib import Path

import torch
from model import GPT, GPTConfig

out_dir = "out"
start = "3"
num_samples = 2
max_new_tokens = 12
temperature = 0.8
top_k = 1
seed = 1337
device = "cpu"
compile = False
exec(Path(__file__).with_name("configurator.py").read_text())

torch.manual_seed(seed)
checkpoint = torch.load(os.path.join(out_dir, "ckpt.pt"), map_location=device)
model = GPT(GPTConfig(**checkpoint["model_args"]))
state_dict = checkpoint["model"]
unwanted_prefix = "_orig_mod."
for k in list(state_dict):
    if k.startswith(unwanted_prefix):
        state_dict[k[len(unwanted_prefix) :]] = state_dict.pop(k)
model.load_state_dict(state_dict)
model.eval()
model.to(device)
if compile:
    model = torch.compile(model)
x = torch.tensor([[int(token) for token in str(start).split()]], device=device)
with torch.no_grad():
    for _ in range(num_samples):
        print(model.generate(x, max_new_tokens, temperature=temperature, top_k=top_k)[0].tolist())
