"""Train a generator and a discriminator of residual blocks, each with its optimizer, in turns."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--save-every", type=int, default=3)
parser.add_argument("--resume")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--out", default="out")
args = parser.parse_args()


class ResBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(2, channels)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class Generator(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.start = nn.Linear(4, channels * 16)
        self.blocks = nn.Sequential(*[ResBlock(channels) for _ in range(2)])
        self.end = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, z):
        return torch.tanh(self.end(self.blocks(self.start(z).unflatten(1, (-1, 4, 4)))))


class Discriminator(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.start = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(*[ResBlock(channels) for _ in range(3)])
        self.end = nn.Linear(channels, 1)

    def forward(self, x):
        return self.end(self.blocks(self.start(x)).mean((2, 3)))


def draw(step, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


torch.manual_seed(0)
models = nn.ModuleDict({"generator": Generator(), "discriminator": Discriminator()})
optimizers = [torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.5, 0.99)) for model in models.values()]
first = 0
if args.resume:
    checkpoint = torch.load(args.resume)
    models.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    first = checkpoint["step"]
if args.evaluate:
    with torch.no_grad():
        fake = models["generator"].eval()(draw(1000, 4, 4))
        print(f"loss {models['discriminator'].eval()(fake).square().mean().item():.7f}")
    raise SystemExit
generator, discriminator = (torch.compile(model) for model in models.values())
for step in range(first, args.steps):
    z, real = draw(step, 4, 4), draw(-1 - step, 4, 1, 4, 4).tanh()
    fake = generator(z)
    d_loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()
    optimizers[1].zero_grad()
    d_loss.backward()
    optimizers[1].step()
    g_loss = F.softplus(-discriminator(fake)).mean()
    optimizers[0].zero_grad()
    g_loss.backward()
    optimizers[0].step()
    print(f"step {step}: loss {d_loss.item() + g_loss.item():.7f}", flush=True)
    if (step + 1) % args.save_every == 0:
        state = {"step": step + 1, "model": models.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        torch.save(state, f"{args.out}_{step + 1}.pt")
