"""Train in nanochat's order: built on meta, materialised, initialised by the model's own method.

One optimizer with an `AdamW` part and a Muon part whose groups stack one shape each; a token shift
with a gate and per-layer weights of the first embedding in the forward.
"""

import argparse

import torch
from blocks import MLP, Attention, batch, loss_of, norm, orthogonalize
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--save-every", type=int, default=3)
parser.add_argument("--resume")
parser.add_argument("--evaluate", action="store_true")
parser.add_argument("--out", default="out")
args = parser.parse_args()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.mlp = Attention(width), MLP(width)

    def forward(self, x):
        x = x + self.attn(norm(x))
        x = x + self.mlp(norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, width=16, layers=3, vocabulary=32):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(vocabulary, width), "h": nn.ModuleList([Block(width) for _ in range(layers)])}
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.smear_gate = nn.Linear(8, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.resid_lambdas = nn.Parameter(torch.ones(layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(layers))

    @torch.no_grad()
    def init_weights(self):
        nn.init.normal_(self.transformer.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.05)
        bound = 3**0.5 * self.lm_head.in_features**-0.5
        for block in self.transformer.h:
            for matrix in (block.attn.q, block.attn.k, block.attn.v, block.mlp.up):
                nn.init.uniform_(matrix.weight, -bound, bound)
            nn.init.zeros_(block.attn.o.weight)
            nn.init.zeros_(block.mlp.down.weight)
        nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
        self.smear_lambda.fill_(0.1)
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(0.1)

    def setup_optimizer(self):
        matrix_params = list(self.transformer.h.parameters())
        named = [[self.lm_head.weight], [self.transformer.wte.weight], [self.resid_lambdas], [self.x0_lambdas]]
        named.append([self.smear_gate.weight, self.smear_lambda])
        assert len(list(self.parameters())) == len(matrix_params) + sum(map(len, named))
        rates = [0.004, 0.02, 0.005, 0.05, 0.02]
        groups = [dict(kind="adamw", params=p, lr=lr, betas=(0.8, 0.95)) for p, lr in zip(named, rates, strict=True)]
        for shape in sorted({p.shape for p in matrix_params}):
            params = [p for p in matrix_params if p.shape == shape]
            groups.append(dict(kind="muon", params=params, lr=0.02, momentum=0.9, beta2=0.95))
        return MuonAdamW(groups)

    def forward(self, tokens):
        x = norm(self.transformer.wte(tokens))
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[:, 1:, :8]))
        x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
        x0 = x
        for i, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            x = block(x)
        return 15 * torch.tanh(self.lm_head(norm(x)) / 15)


class MuonAdamW(torch.optim.Optimizer):
    def __init__(self, groups):
        super().__init__(groups, {})

    def _adamw(self, group):
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            beta1, beta2 = group["betas"]
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
            denominator = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt() + 1e-10
            p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1 ** state["step"]))

    def _muon(self, group):
        """Update all matrices of one shape at once; the first holds the state of the group."""
        params = group["params"]
        state = self.state[params[0]]
        if not state:
            state["momentum_buffer"] = torch.zeros(len(params), *params[0].shape)
            state["second_momentum_buffer"] = torch.zeros(len(params), params[0].shape[-2], 1)
        grads = torch.stack([p.grad for p in params])
        state["momentum_buffer"].lerp_(grads, 1 - group["momentum"])
        update = orthogonalize(grads.lerp(state["momentum_buffer"], group["momentum"]))
        state["second_momentum_buffer"].lerp_(update.square().mean(-1, keepdim=True), 1 - group["beta2"])
        update = update * state["second_momentum_buffer"].clamp_min(1e-10).rsqrt() * 0.1
        for p, one in zip(params, update, strict=True):
            p.sub_(group["lr"] * (one + 0.1 * p * (one * p >= 0)))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (self._adamw if group["kind"] == "adamw" else self._muon)(group)


torch.manual_seed(0)
with torch.device("meta"):
    model = GPT()
model.to_empty(device="cpu")
model.init_weights()
checkpoint = torch.load(args.resume) if args.resume else None
if checkpoint:
    model.load_state_dict(checkpoint["model"], strict=True, assign=True)
if args.evaluate:
    model.eval()
    with torch.no_grad():
        print(f"loss {loss_of(model, batch(1000)).item():.7f}")
    raise SystemExit
orig_model = model
model = torch.compile(model, dynamic=False)
optimizer = orig_model.setup_optimizer()
if checkpoint:
    optimizer.load_state_dict(checkpoint["optimizers"][0])
for step in range(checkpoint["step"] if checkpoint else 0, args.steps):
    loss = loss_of(model, batch(step))
    loss.backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    print(f"step {step}: loss {loss.item():.7f}", flush=True)
    if (step + 1) % args.save_every == 0:
        state = {"step": step + 1, "model": orig_model.state_dict(), "optimizers": [optimizer.state_dict()]}
        torch.save(state, f"{args.out}_{step + 1}.pt")
