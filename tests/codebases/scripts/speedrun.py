"""Train in the order of a speedrun: Muon for the blocks' matrices, AdamW for the rest by name.

Model, parameters sorted by name and dimension into two optimizers, compile, loop.
"""

import argparse

import torch
from blocks import GPT, batch, loss_of, orthogonalize

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--save-every", type=int, default=3)
parser.add_argument("--resume")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--out", default="out")
args = parser.parse_args()


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=0.02, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(state["momentum_buffer"])
                p.add_(update, alpha=-group["lr"] * max(1, p.size(-2) / p.size(-1)) ** 0.5)


torch.manual_seed(0)
model = GPT()
checkpoint = torch.load(args.resume) if args.resume else None
if checkpoint:
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()})
if args.evaluate:
    model.eval()
    with torch.no_grad():
        print(f"loss {loss_of(model, batch(1000)).item():.7f}")
    raise SystemExit
hidden_matrix_params = [p for n, p in model.blocks.named_parameters() if p.ndim >= 2 and "embed" not in n]
embed_params = [p for n, p in model.named_parameters() if "embed" in n]
scalar_params = [p for p in model.parameters() if p.ndim < 2]
head_params = [model.head.weight]
groups = [dict(params=head_params, lr=0.01), dict(params=embed_params, lr=0.02)]
groups += [dict(params=scalar_params, lr=0.005)] if scalar_params else []
optimizers = [torch.optim.AdamW(groups, betas=(0.8, 0.95), weight_decay=0.0), Muon(hidden_matrix_params)]
if checkpoint:
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
model = torch.compile(model)
for step in range(checkpoint["step"] if checkpoint else 0, args.steps):
    loss = loss_of(model, batch(step))
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= 0.95
        optimizer.step()
    model.zero_grad(set_to_none=True)
    print(f"step {step}: loss {loss.item():.7f}", flush=True)
    if (step + 1) % args.save_every == 0:
        state = {"step": step + 1, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        torch.save(state, f"{args.out}_{step + 1}.pt")
