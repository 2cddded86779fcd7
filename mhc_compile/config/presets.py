"""Presets: how the hyper-connections of each system that ships them differ. Torch-free."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mhc_compile.config.coefficient_spec import Convention
from mhc_compile.errors import OptionError

#: The end of a chain: the mean or the sum of the streams, or a sum with learned weights.
ReadOut = Literal["mean", "sum", "learned"]
#: The initial gain of the paper, and of the systems that ship hyper-connections.
PAPER_GAIN = 0.01
#: s of a function-preserving start (see `examples/stability`). As powers of two s and c change no
#: bit of a checkpoint that is converted.
GATE_SPEED = 32.0
#: c of a function-preserving start, about the paper's initial gain: a then learns as the paper's
#: would in units of its start.
SCALE_SPEED = 1 / 128


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The convention of one system that ships hyper-connections.

    `register_preset(Preset(...))` adds one.

    Attributes:
        name: what `options={"preset": ...}` takes.
        source: where the equations are to be found.
        convention: how coefficients are computed.
        iterations: of Sinkhorn.
        eps: added to the mean square under the root mean square.
        read_out: what ends a chain.
        single_pass: the weights `pre` of a site collapse the streams for the next site; the first
            site reads the trunk itself.
        init_gain: initial a_pre, a_post and a_res.
        gate_speed: s of the convention; None for that of the start, `gate_speed`.
        scale_speed: c of the convention; None for that of the start, `scale_speed`.
        preserves: whether the plain model is among the functions that it can start as.
    """

    name: str
    source: str
    convention: Convention = field(default_factory=Convention)
    iterations: int = 20
    eps: float = 1e-6
    read_out: ReadOut = "mean"
    single_pass: bool = False
    init_gain: float = PAPER_GAIN
    gate_speed: float | None = None
    scale_speed: float | None = None
    preserves: bool = True

    def defaults(self) -> dict[str, Any]:
        """Return the options for which this preset gives the defaults."""
        return {
            "mapping": self.convention.mapping,
            "iterations": self.iterations,
            "eps": self.eps,
            "read_out": self.read_out,
            "single_pass": self.single_pass,
            "rank": self.convention.rank,
            "init_gain": self.init_gain,
            "gate_speed": self.gate_speed,
            "scale_speed": self.scale_speed,
        }


def gate_speed(given: float | None, init: str, mapping: str) -> float:
    """Return s of `Convention`, by which b moves logits faster than by the learning rate.

    A function-preserving start is far from what a training from scratch would choose, and bounded
    gates answer little to a step. Not so the entries of an unconstrained H_res.
    """
    if given is not None:
        return given
    return GATE_SPEED if init == "preserve" and mapping != "unconstrained" else 1.0


def scale_speed(given: float | None, init: str) -> float:
    """Return c of `Convention`, by which a moves slower than by the learning rate.

    A step of lr is a tenth of the paper's a = 0.01 or more where lr is large, and a multiplies
    everything that phi has learned: with c = 1 gates close early and branches with them.
    """
    if given is not None:
        return given
    return SCALE_SPEED if init == "preserve" else 1.0


# The paper's equations, an epsilon in Sinkhorn and in pre, a learned read-out. The module computes
# `comb` with a row softmax and columns last, and applies it transposed, `combᵀ X`: H_res = combᵀ
# has its rows normalised last, as the paper's. What is left of the transpose is the order of the 16
# residual columns in a checkpoint (`mhc_compile.interop`).
_DEEPSEEK_V4 = Preset(
    name="deepseek-v4",
    source="transformers.models.deepseek_v4 (DeepseekV4HyperConnection, DeepseekV4HyperHead)",
    convention=Convention(pre_eps=1e-6, sinkhorn_eps=1e-6),
    read_out="learned",
    gate_speed=1.0,
    scale_speed=1.0,
)
_PRESETS = (
    Preset(name="paper", source="arXiv 2512.24880 v2, equations 5 to 9"),
    _DEEPSEEK_V4,
    # In a single pass over the streams: the weights `pre` that a site computes collapse the streams
    # for the next site: what they are computed from need not be read a second time. The first site
    # reads the trunk itself, and the weights of the last one end the chain.
    replace(
        _DEEPSEEK_V4,
        name="deepseek-v4.1",
        source="DeepSeek-V4.1, single pass; no module of transformers 5.23 has it",
        read_out="mean",
        single_pass=True,
    ),
    replace(
        _DEEPSEEK_V4,
        name="glm5-next",
        source="transformers.models.glm5_next (Glm5NextTextHyperConnection, Glm5NextTextHyperHead)",
        eps=1e-5,
        read_out="mean",
    ),
    # Streams are not mixed (H_res = I).
    Preset(
        name="hy-v4",
        source="transformers.models.hy_v4 (HYV4HyperConnection, HYV4HyperHead)",
        convention=Convention(mapping="identity", pre_eps=1e-6, post_eps=1e-6),
        eps=1e-5,
        read_out="learned",
        gate_speed=1.0,
        scale_speed=1.0,
    ),
    # DeepSeek-V4's Sinkhorn without the transpose: columns are exact.
    Preset(
        name="liger",
        source="liger_kernel.transformers.mhc (LigerMHC), version 0.8.5",
        convention=Convention(sinkhorn_eps=1e-6, last="columns"),
        gate_speed=1.0,
        scale_speed=1.0,
    ),
    # Streams are not mixed (H_res = I); a branch reads with one weight per channel.
    #
    #     x̂    = rmsnorm(X) per stream, times a learned weight
    #     gate = σ(silu(x̂ W_down / n) W_up)         [n, C], through a low rank
    #     h    = mean_j gate_j ∘ x̂_j                 the branch's input, which is normalised already
    #     post = 2 σ(x̂ W_inject / n)
    #
    # No parameters make this the plain residual add, so a model must be trained from scratch.
    Preset(
        name="qwen4-exp",
        source="transformers.models.qwen4_exp (Qwen4ExpTextGatedResidual)",
        convention=Convention(mapping="identity", rank=320),
        read_out="learned",
        gate_speed=1.0,
        scale_speed=1.0,
        preserves=False,
    ),
)
#: By name.
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _PRESETS}


def get_preset(name: str) -> Preset:
    """Return the preset called `name`.

    Raises:
        OptionError: there is none; the message gives the nearest name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"preset {name!r} is unknown; {hint}known presets: {', '.join(PRESETS)}")
    return PRESETS[name]


def register_preset(preset: Preset) -> Preset:
    """Register a preset for `options={"preset": ...}` and `--preset`, and return it.

    Raises:
        OptionError: another preset has that name.
    """
    if PRESETS.setdefault(preset.name, preset) != preset:
        raise OptionError(f"preset {preset.name!r} exists already and is another one; choose another name")
    return preset
