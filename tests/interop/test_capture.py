"""The trunks of the models that ship with hyper-connections, plain: captured whole, every residual
add found, values and gradients kept.
"""

from __future__ import annotations

import pytest
import torch
from helpers.builders import relative
from helpers.plain_models import LAYERS, SHIPPING, inputs, output, plain_model

import mhc_compile

# That the default run knows as well: the tests of equivalence fail if a site is missing.
pytestmark = pytest.mark.slow

ATTENTION = {"qwen4-exp": "linear_attn"}


@pytest.fixture(params=SHIPPING)
def name(request):
    return request.param


def test_the_plain_model_is_one_graph_and_one_chain(name):
    model = plain_model(name)
    explanation = mhc_compile.explain(model, input_ids=inputs())
    layers = "layers" if name == "glm5-next" else "model.layers"
    assert [site.path for site in explanation.sites] == [
        f"{layers}.{layer}.mhc.{branch}"
        for layer in range(LAYERS)
        for branch in (ATTENTION.get(name, "self_attn"), "mlp")
    ]
    assert (len(explanation.graphs), len(explanation.chains)) == (1, 1)


def test_the_start_is_the_plain_model(name):
    model = plain_model(name)
    wanted = output(model(input_ids=inputs()))
    probe = torch.randn_like(wanted)
    (wanted * probe).sum().backward()
    gradients = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, backend="mhc", options={"inner_backend": "eager", "strict": True})
    got = output(compiled(input_ids=inputs()))
    (got * probe).sum().backward()
    assert relative(got, wanted) < 1e-5
    assert len(mhc_compile.connections(model)) == 2 * LAYERS
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in gradients.values())
    errors = {path: relative(model.get_parameter(path).grad, g, floor) for path, g in gradients.items()}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)
