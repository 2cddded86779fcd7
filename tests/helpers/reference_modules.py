"""Sites of the systems that ship hyper-connections, as functions of streams and a branch, with
their own modules and parameters.

`Native.ours` are the same parameters in our layout, written out here once more, independently of
`mhc_compile.interop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

N, WIDTH, ITERATIONS, RANK = 4, 6, 20, 3
Branch = Callable[[Tensor], Tensor]


@dataclass
class Native:
    """A site: `run(streams, branch)` gives the new streams; `end(streams)` the read-out. `ours` and
    `ours_end` are made of the same leaves.
    """

    preset: str
    parameters: dict[str, Tensor]
    run: Callable[[Tensor, Branch], Tensor]
    ours: Callable[[], tuple[Tensor, Tensor, Tensor]]
    end: Callable[[Tensor], Tensor] | None = None
    ours_end: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None


def randomise(module: nn.Module, std: float = 0.7) -> dict[str, Tensor]:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return dict(module.named_parameters())


def turned(residual: Tensor) -> Tensor:
    """The residual rows of a matrix that is applied transposed, in the order of one that is not."""
    return residual.unflatten(0, (N, N)).transpose(0, 1).flatten(0, 1)


def deepseek_v4() -> Native:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    config = DeepseekV4Config(hidden_size=WIDTH, hc_mult=N, hc_sinkhorn_iters=ITERATIONS)
    site, head = v4.DeepseekV4HyperConnection(config), v4.DeepseekV4HyperHead(config)
    return _like_v4("deepseek-v4", site, head)


def glm5_next() -> Native:
    from transformers.models.glm5_next import modeling_glm5_next as glm
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig

    config = Glm5NextTextConfig(hidden_size=WIDTH, hc_mult=N, hc_sinkhorn_iters=ITERATIONS)
    return _like_v4("glm5-next", glm.Glm5NextTextHyperConnection(config), glm.Glm5NextTextHyperHead())


def _like_v4(preset: str, site: nn.Module, head: nn.Module) -> Native:
    parameters = {**randomise(site), **randomise(head)}

    def run(streams: Tensor, branch: Branch) -> Tensor:
        post, comb, h = site(streams)
        dtype = streams.dtype
        written = post.to(dtype).unsqueeze(-1) * branch(h).unsqueeze(-2)
        return written + comb.to(dtype).transpose(-1, -2) @ streams

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        fn, base = site.fn, site.base
        return (
            torch.cat([fn[: 2 * N], turned(fn[2 * N :])]).t(),
            torch.cat([base[: 2 * N], turned(base[2 * N :])]),
            site.scale,
        )

    learned = hasattr(head, "hc_fn")
    return Native(
        preset,
        parameters,
        run,
        ours,
        head,
        (lambda: (head.hc_fn.t(), head.hc_base, head.hc_scale)) if learned else None,
    )


def hy_v4() -> Native:
    from transformers.models.hy_v4 import modeling_hy_v4 as hy
    from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config

    config = HYV4Config(hidden_size=WIDTH, hc_mult=N)
    site, head = hy.HYV4HyperConnection(config), hy.HYV4HyperHead(config)
    parameters = {**randomise(site), **randomise(head)}

    def run(streams: Tensor, branch: Branch) -> Tensor:
        post, h = site(streams)
        return (post.float().unsqueeze(-1) * branch(h).float().unsqueeze(-2) + streams.float()).to(streams.dtype)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return site.fn.t(), site.base, torch.cat([site.scale, site.scale.new_zeros(1)])

    return Native("hy-v4", parameters, run, ours, head, lambda: (head.hc_fn.t(), head.hc_base, head.hc_scale))


def qwen4_exp() -> Native:
    from transformers.models.qwen4_exp import modeling_qwen4_exp as qwen
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    config = Qwen4ExpTextConfig(hidden_size=WIDTH, hc_count=N, hc_lowrank=RANK)
    site, mixer = qwen.Qwen4ExpTextGatedResidual(config), qwen.Qwen4ExpTextGatedResidual(config, use_combine=False)
    parameters = {**randomise(site), **{f"mixer.{name}": value for name, value in randomise(mixer).items()}}

    def run(streams: Tensor, branch: Branch) -> Tensor:
        h, flat, weights = site(streams.flatten(-2))
        return (flat + (branch(h).unsqueeze(-2) * weights.unsqueeze(-1)).flatten(-2)).unflatten(-1, (N, WIDTH))

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        down, inject = site.input_mix_weight_down.weight, site.block_inject_weight.weight
        return torch.cat([down, inject]).t(), site.hc_norm.weight, site.input_mix_weight_up.weight.t()

    def ours_end() -> tuple[Tensor, Tensor, Tensor]:
        return mixer.input_mix_weight_down.weight.t(), mixer.hc_norm.weight, mixer.input_mix_weight_up.weight.t()

    return Native("qwen4-exp", parameters, run, ours, lambda streams: mixer(streams.flatten(-2)), ours_end)


def liger() -> Native:
    """Liger-Kernel 0.8.5 has Triton kernels alone; this is what they compute
    (`_mhc_split_sinkhorn_fwd_kernel`, `_mhc_post_res_fwd_kernel`).
    """
    phi = nn.Parameter(0.7 * torch.randn(N * WIDTH, 2 * N + N * N))
    b, alpha = nn.Parameter(0.7 * torch.randn(2 * N + N * N)), nn.Parameter(torch.randn(3))
    eps = 1e-6

    def run(streams: Tensor, branch: Branch) -> Tensor:
        flat = streams.flatten(-2).float()
        mix = flat @ phi.float() * torch.rsqrt((flat * flat).mean(-1, keepdim=True) + 1e-6)
        pre = torch.sigmoid(alpha[0] * mix[..., :N] + b[:N])
        post = 2 * torch.sigmoid(alpha[1] * mix[..., N : 2 * N] + b[N : 2 * N])
        matrix = (alpha[2] * mix[..., 2 * N :] + b[2 * N :]).unflatten(-1, (N, N)).softmax(-1) + eps
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
        for _ in range(ITERATIONS - 1):
            matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
            matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
        h = (pre.unsqueeze(-1) * streams.float()).sum(-2).to(streams.dtype)
        mixed = torch.einsum("...oi,...ic->...oc", matrix, streams.float())
        return (mixed + post.unsqueeze(-1) * branch(h).float().unsqueeze(-2)).to(streams.dtype)

    return Native("liger", {"phi": phi, "b": b, "alpha": alpha}, run, lambda: (phi, b, alpha))


NATIVES = {
    "deepseek-v4": deepseek_v4,
    "glm5-next": glm5_next,
    "hy-v4": hy_v4,
    "qwen4-exp": qwen4_exp,
    "liger": liger,
}
