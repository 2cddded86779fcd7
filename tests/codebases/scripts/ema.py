"""Train with an average of the weights: a deep copy before torch.compile, updated by name."""

import argparse
import copy

import torch
from blocks import GPT, batch, loss_of

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--save-every", type=int, default=3)
parser.add_argument("--resume")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--out", default="out")
args = parser.parse_args()


@torch.no_grad()
def update(average, model, decay=0.5):
    parameters = dict(model.named_parameters())
    for name, parameter in average.named_parameters():
        parameter.lerp_(parameters[name], 1 - decay)


torch.manual_seed(0)
model = GPT()
average = copy.deepcopy(model).eval().requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
first = 0
if args.resume:
    checkpoint = torch.load(args.resume)
    model.load_state_dict(checkpoint["model"])
    average.load_state_dict(checkpoint["average"])
    optimizer.load_state_dict(checkpoint["optimizers"][0])
    first = checkpoint["step"]
if args.evaluate:
    with torch.no_grad():
        print(f"loss {loss_of(average, batch(1000)).item():.7f}")
    raise SystemExit
compiled = torch.compile(model)
for step in range(first, args.steps):
    optimizer.zero_grad()
    loss = loss_of(compiled, batch(step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    update(average, model)
    print(f"step {step}: loss {loss.item():.7f}", flush=True)
    if (step + 1) % args.save_every == 0:
        state = {"step": step + 1, "model": model.state_dict(), "average": average.state_dict()}
        torch.save({**state, "optimizers": [optimizer.state_dict()]}, f"{args.out}_{step + 1}.pt")
