"""The rewritten model computes what the plain one does: outputs, buffers, written inputs, and every original gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mhc_compile import zoo
from mhc_compile.zoo.check import check
from mhc_compile.zoo.family import Family, chains
from mhc_compile.zoo.parts import FeedForward
from mhc_compile.zoo.preservation import preservation

#: One family for each way in which streams are carried; the others are slow tests.
FAST = frozenset(
    "pre-norm-dropout post-norm parallel-sum deepnorm layer-scale stochastic-depth dropped-trunk dit cait swin-windows global-context resnet"
    " regnet padded-resnet efficientnet rrdb uvit conformer decomposed shared-layer siamese hidden-states reversible add-statement"
    " augmented-trunk written-input addcmul cast-skip promoted-sum break-in-middle checkpointed frozen-half autograd-function torch-encoder-masked"
    " trap-many-streams trap-experts".split()
)
OPTIONS = {"streams": 3}


@pytest.mark.zoo(layers_and_modes={(2, "train"): True, (2, "eval"): False}, fast=lambda family: family.name in FAST)
def test_outputs_and_gradients_are_those_of_the_plain_model(family, layers, mode):
    outcome = check(family, layers=layers, mode=mode, options=OPTIONS)
    assert outcome.status != "failed", outcome.message
    assert outcome.error_forward <= family.tolerance, outcome.message
    assert outcome.error_gradients <= family.tolerance, outcome.message


@pytest.mark.parametrize("name", ["post-norm", "resnet", "dit", "gpt2"])
def test_eval_mode_is_preserved(name):
    outcome = check(zoo.get(name), mode="eval", options=OPTIONS)
    assert max(outcome.error_forward, outcome.error_gradients) <= 1e-5, outcome.message


def test_a_rewrite_that_changes_the_function_is_noticed():
    outcome = check(zoo.get("pre-norm"), options={"start": "scratch"})
    assert outcome.status == "deviates"
    assert outcome.error_forward > 1e-3
    assert "output deviates by" in outcome.message


class Drifting(nn.Module):
    """Another function under compilation: what a wrong rewrite would be."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.f = what, FeedForward()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        y = self.f(x)
        if torch.compiler.is_compiling():
            if self.what == "gradient":
                y = y + (self.f[1].bias - self.f[1].bias.detach()).sum()
            if self.what == "buffer":
                self.seen += 1
            if self.what == "output":
                y = y * 1.001
            if self.what == "shape":
                y = y[:1]
        return y


@pytest.mark.parametrize(
    ("what", "worst"),
    [("nothing", ""), ("gradient", "f.1.bias"), ("buffer", "buffer seen"), ("output", "output"), ("shape", "output")],
)
def test_each_kind_of_difference_is_seen(what, worst):
    family = Family("drifting", "none", lambda n: (Drifting(what), (torch.randn(2, 5, 16),), {}), chains(lambda n: ()))
    errors = preservation(family.build(1), {}, double=False, differentiable_inputs=True)
    if not worst:
        assert max(errors.forward, errors.gradients) < 1e-6
    elif what == "gradient":
        assert errors.forward < 1e-6
        assert (errors.gradients > 1e-4, errors.worst_gradient) == (True, worst)
    else:
        assert (errors.forward > 1e-4, errors.worst_output) == (True, worst)


def test_a_model_that_cannot_run_is_failed_and_not_raised():
    family = Family("broken", "none", lambda n: (nn.Linear(3, 3), (torch.randn(2, 4),), {}), chains(lambda n: ()))
    outcome = check(family)
    assert outcome.status == "failed"
    assert "could not be traced" in outcome.message
