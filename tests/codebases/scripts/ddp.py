"""Train in several processes: `DDP(compile(model))` or `compile(DDP(model))`, with accumulation."""

import argparse
import contextlib

import torch
from blocks import GPT, batch, loss_of
from torch import distributed
from torch.nn.parallel import DistributedDataParallel as DDP

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--save-every", type=int, default=3)
parser.add_argument("--resume")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--out", default="out")
parser.add_argument("--order", choices=["compile-ddp", "ddp-compile"], default="ddp-compile")
args = parser.parse_args()

torch.manual_seed(0)
model = GPT()
checkpoint = torch.load(args.resume) if args.resume else None
if checkpoint:
    model.load_state_dict(checkpoint["model"])
if args.evaluate:
    model.eval()
    with torch.no_grad():
        print(f"loss {loss_of(model, batch(1000)).item():.7f}")
    raise SystemExit
alone = not distributed.is_torchelastic_launched()
if alone:
    rank, world, wrapped = 0, 1, torch.compile(model)
else:
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    wrapped = DDP(torch.compile(model)) if args.order == "ddp-compile" else torch.compile(DDP(model))
optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, eps=1e-4)
if checkpoint:
    optimizer.load_state_dict(checkpoint["optimizers"][0])
for step in range(checkpoint["step"] if checkpoint else 0, args.steps):
    total = torch.zeros(())
    for micro in range(2):
        tokens = batch(2 * step + micro).chunk(world)[rank]
        with wrapped.no_sync() if micro == 0 and not alone else contextlib.nullcontext():
            loss = loss_of(wrapped, tokens) / 2
            loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    if not alone:
        distributed.all_reduce(total)
    if rank == 0:
        print(f"step {step}: loss {total.item() / world:.7f}", flush=True)
        if (step + 1) % args.save_every == 0:
            state = {"step": step + 1, "model": model.state_dict(), "optimizers": [optimizer.state_dict()]}
            torch.save(state, f"{args.out}_{step + 1}.pt")
if not alone:
    distributed.destroy_process_group()
