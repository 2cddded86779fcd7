"""Train a small GPT-2 with the Trainer; started again, it resumes from the last checkpoint."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import mhc_compile
from mhc_compile.tools.demo.data import load_corpus

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--output", type=Path, default=Path("runs/trainer"))
parser.add_argument("--options", type=json.loads, help='of the backend, as JSON: {"streams": 2}')
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--save-every", type=int, default=100)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--context", type=int, default=128)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=128)
given = parser.parse_args()

set_seed(0)
config = GPT2Config(
    vocab_size=256,
    n_positions=given.context,
    n_embd=given.width,
    n_layer=given.layers,
    n_head=given.width // 32,
    bos_token_id=0,
    eos_token_id=0,
)
model = GPT2LMHeadModel(config)
windows = load_corpus().train.windows(512, given.context, torch.Generator().manual_seed(0))

model.compile(backend="mhc", options=given.options)  # in place: it stays the model that the Trainer knows how to save
last = get_last_checkpoint(given.output) if os.path.isdir(given.output) else None
if last:
    mhc_compile.restore(model, last)  # before the Trainer loads the rest and builds its optimizer

arguments = TrainingArguments(
    str(given.output),
    max_steps=given.steps,
    save_steps=given.save_every,
    per_device_train_batch_size=given.batch,
    learning_rate=1e-3,
    weight_decay=0.1,
    logging_steps=max(1, given.steps // 4),
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in windows])
trainer.train(resume_from_checkpoint=last)

for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']:5d}  loss {float(entry['loss']):.4f}")
connections = mhc_compile.connections(model)
print(f"{len(connections)} hyper-connections, {sum(bool(c.phi.any()) for c in connections.values())} of them trained")
start = windows[:1, :8]
text = model.eval().generate(
    start, max_new_tokens=min(32, given.context - 8), do_sample=False, pad_token_id=0
)  # on streams as well
print(repr(bytes(text[0].tolist()).decode("latin-1")))
