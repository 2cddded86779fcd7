"""Train a small decoder with hyper-connections on several processes, by DDP or by FSDP2."""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import mhc_compile
from mhc_compile.distributed import fully_shard

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
parser.add_argument(
    "--inner-backend", default="inductor", help='the compiler of the rewritten graphs; "eager" to debug'
)
parser.add_argument("--bf16", action="store_true", help="FSDP: compute in bfloat16, hyper-connections in float32")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--batch", type=int, default=8, help="sequences of each process")
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=128)
arguments = parser.parse_args()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
model = Decoder(arguments.width, arguments.layers).to(device)
# Before the model is wrapped: DDP and FSDP must find the parameters.
mhc_compile.attach(model, torch.zeros(1, arguments.length, dtype=torch.long, device=device))

options = {"inner_backend": arguments.inner_backend}
if arguments.parallel == "ddp":
    call = torch.compile(DistributedDataParallel(model), backend="mhc", options=options)
else:
    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if arguments.bf16 else None, reduce_dtype=torch.float32)
    for block in model.blocks:
        block.compile(backend="mhc", options=options)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    call = fully_shard(model, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

# Every process draws sequences of its own. In each, a token is the sum of the two before it.
data = torch.Generator().manual_seed(1 + rank)
for step in range(arguments.steps):
    rows = [torch.randint(0, 64, (arguments.batch,), generator=data) for _ in range(2)]
    for _ in range(arguments.length - 1):
        rows.append((rows[-1] + rows[-2]) % 64)
    window = torch.stack(rows, dim=1).to(device)
    loss = F.cross_entropy(call(window[:, :-1]).flatten(0, 1).float(), window[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    if rank == 0 and (step in (0, arguments.steps - 1) or (step + 1) % 50 == 0):
        print(f"step {step + 1:4d}  loss {mean.item():.4f}")

mine = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
if rank == 0:
    attached = len(mhc_compile.connections(model))
    print(f"{arguments.parallel} on {world} processes: {attached} hyper-connections, {mine:,} parameters on rank 0")
dist.destroy_process_group()
