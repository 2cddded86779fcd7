"""Small models that several test files use, and the comparison of a compiled model with the plain
one.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = 2


class Attention(nn.Module):
    """Causal self-attention with fused projections."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block: two residual adds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head. Nothing about it knows of streams."""

    def __init__(self, width: int = 8, layers: int = LAYERS, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Pair(nn.Module):
    """The least that is a chain: two residual adds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(torch.tanh(x))
        return x + self.second(torch.sin(x))


class Small(nn.Module):
    """A pair with something before it and behind it; traced in a moment."""

    SITES = ("pair.mhc.first", "pair.mhc.second")

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inwards = nn.Linear(3, width)
        self.pair = Pair(width)
        self.outwards = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outwards(self.pair(self.inwards(x)))


def points(count: int = 5) -> Tensor:
    return torch.linspace(-1.0, 1.0, 3 * count).reshape(count, 3)


def tokens(batch: int = 2, length: int = 5, vocabulary: int = 11) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) * 7 % vocabulary


@dataclass(frozen=True)
class Case:
    """A model of a library, with inputs. `layers` blocks, `per_layer` residual adds each."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    layers: int = LAYERS
    per_layer: int = 2

    def loss(self, output: Any) -> Tensor:
        logits = self.logits(output)
        if logits.dim() == 3:
            return F.cross_entropy(
                logits.flatten(0, 1).float(), torch.arange(math.prod(logits.shape[:2])) % logits.shape[-1]
            )
        return F.cross_entropy(logits.float(), torch.arange(len(logits)) % logits.shape[-1])

    @staticmethod
    def logits(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output.logits


FAMILIES = ("gpt2", "llama", "qwen2", "mistral", "opt", "vit", "encoder")


def build(name: str, layers: int = LAYERS) -> Case:
    """Build one of FAMILIES, tiny, randomly initialised, with every dropout at its default."""
    if name == "encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True)
        return Case(
            name,
            nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
            {"src": torch.randn(2, 7, 16)},
            layers,
        )
    import transformers as t

    t.logging.set_verbosity_error()
    common = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    text = {"vocab_size": 31, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    ids = {"input_ids": torch.arange(14).reshape(2, 7) * 5 % 31}
    glu = {**common, **text, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": None}
    match name:
        case "gpt2":
            config = t.GPT2Config(n_layer=layers, n_embd=16, n_head=2, n_positions=32, **text)
            return Case(name, t.GPT2LMHeadModel(config), ids, layers)
        case "llama":
            return Case(name, t.LlamaForCausalLM(t.LlamaConfig(**glu)), ids, layers)
        case "qwen2":
            return Case(name, t.Qwen2ForCausalLM(t.Qwen2Config(**glu)), ids, layers)
        case "mistral":
            return Case(name, t.MistralForCausalLM(t.MistralConfig(**glu)), ids, layers)
        case "opt":
            config = t.OPTConfig(ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16, **common, **text)
            return Case(name, t.OPTForCausalLM(config), ids, layers)
        case "vit":
            config = t.ViTConfig(**common, intermediate_size=24, image_size=16, patch_size=8, num_labels=5)
            return Case(name, t.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}, layers)
    raise ValueError(name)


@dataclass(frozen=True)
class Run:
    """Logits, loss and the gradients by parameter name of one forward and backward pass."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def run(case: Case, call: Any, model: nn.Module, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    output = call(**case.inputs)
    loss = case.loss(output)
    loss.backward()
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return Run(case.logits(output).detach(), loss.detach(), gradients)


def without_dropout(model: nn.Module) -> nn.Module:
    """Inductor draws its random numbers in another order than eager: compare without any."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def relative(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Largest deviation over the largest magnitude."""
    scale = max(want.abs().max().item(), floor, 1e-30)
    return (got.double() - want.double()).abs().max().item() / scale


def distance(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """Euclidean distance over Euclidean norm."""
    return (got.double() - want.double()).norm().item() / max(want.double().norm().item(), floor, 1e-30)


def assert_same(got: Run, want: Run, tolerance: float) -> None:
    """Logits, loss and every original gradient agree.

    Some gradients are zero in exact arithmetic (the bias of k in attention) and are rounding noise
    here; so that noise is not compared with noise, a gradient's magnitude counts as at least 1e-3
    of the largest in the model.
    """
    assert relative(got.logits, want.logits) < tolerance
    assert relative(got.loss, want.loss) < tolerance
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in want.gradients.values())
    errors = {name: relative(got.gradients[name], gradient, floor) for name, gradient in want.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, (worst, errors[worst])


class Deep(nn.Module):
    """Blocks between two other layers: with the chain's ends at the graph's edges, streams would be
    expected to go on elsewhere.
    """

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, width)
        self.branches = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.after(x)
