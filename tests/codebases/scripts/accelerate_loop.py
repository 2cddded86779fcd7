"""Train with accelerate: `prepare`, `save_state` and `load_state`; the dynamo backend by name."""

import argparse

import torch
from accelerate import Accelerator
from blocks import GPT, batch, loss_of

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--save-every", type=int, default=3)
parser.add_argument("--resume")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--out", default="out")
parser.add_argument("--dynamo-backend", default="inductor")
args = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, dynamo_backend=args.dynamo_backend, gradient_accumulation_steps=2)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
first = 0
if args.resume:
    accelerator.load_state(args.resume)
    first = int(args.resume.rpartition("_")[2])
if args.evaluate:
    model.eval()
    with torch.no_grad():
        print(f"loss {loss_of(model, batch(1000)).item():.7f}")
    raise SystemExit
for step in range(first, args.steps):
    for micro in range(2):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch(2 * step + micro))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.7f}", flush=True)
    if (step + 1) % args.save_every == 0:
        accelerator.save_state(f"{args.out}_{step + 1}")
