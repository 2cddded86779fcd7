"""The plain model with a preset's hyper-connections and the shipping model's parameters is the
shipping model.
"""

from __future__ import annotations

import pytest
import torch
from helpers.builders import relative
from helpers.plain_models import SHIPPING, STREAMS, inputs, native_model, output, plain_model

import mhc_compile
from mhc_compile import interop
from mhc_compile.interop.convert import convert


def compiled(name, model, **options):
    settings = {"preset": name, "streams": STREAMS, "strict": True, **SHIPPING[name].options, **options}
    result = torch.compile(model, backend="mhc", options=settings)
    result(input_ids=inputs())
    return result


def pass_through(call, model):
    """Logits, and the gradients of a random scalar function of them, by the parameter's name."""
    model.zero_grad()
    got = output(call(input_ids=inputs()))
    probe = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).sin().reshape(got.shape)
    (got * probe).sum().backward()
    return got.detach(), {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


def assert_same(got, wanted, tolerance):
    assert relative(got[0], wanted[0]) < tolerance
    largest = max(gradient.abs().max().item() for gradient in wanted[1].values())
    errors = {path: relative(got[1][path], wanted[1][path], 1e-3 * largest) for path in wanted[1]}
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, (worst, errors[worst])


def check(name, tolerance, *, wide=False, **options):
    native, model = native_model(name, wide=wide), plain_model(name, wide=wide)
    call = compiled(name, model, **options)
    before = output(call(input_ids=inputs())).detach()
    interop.import_state_dict(call, native.state_dict(), name)
    got, wanted = pass_through(call, model), pass_through(native, native)
    assert relative(before, wanted[0]) > 0.01
    # A gradient of the shipping model is converted as a parameter is.
    converted = interop.from_native(wanted[1], name)
    if name == "hy-v4":  # nothing reads a_res, and there is none in the shipping model
        for path, gradient in converted.items():
            gradient[2:] = (
                gradient[2:] if not path.endswith("self_attn.scale") and not path.endswith("mlp.scale") else 0
            )
    assert_same(got, (wanted[0], converted), tolerance)
    return native, model, call, wanted


SLOW = {"glm5-next", "qwen4-exp"}  # linear attention is a long graph


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in SHIPPING])
def test_logits_and_gradients_are_those_of_the_shipping_model(name):
    native, model, _, wanted = check(name, 1e-5, inner_backend="eager")

    other = native_model(name)
    assert relative(output(other(input_ids=inputs())), wanted[0]) > 0.01
    other.load_state_dict(interop.export_state_dict(model, name), strict=True)
    for path, value in native.state_dict().items():
        assert torch.equal(other.state_dict()[path], value), path


@pytest.mark.parametrize("name", ["deepseek-v4", "hy-v4"])
def test_files_that_transformers_saved_come_back_the_same(name, tmp_path):
    native = native_model(name)
    native.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    convert(tmp_path / "saved", tmp_path / "ours", name, native=False)
    convert(tmp_path / "ours", tmp_path / "back", name, native=True, spelling="saved")
    loaded = type(native).from_pretrained(tmp_path / "back", attn_implementation="eager")
    for path, value in native.state_dict().items():
        assert torch.equal(loaded.state_dict()[path], value), path


@pytest.mark.slow
def test_the_plain_class_loads_converted_files_of_the_shipping_one(tmp_path):
    native, model = native_model("deepseek-v4"), plain_model("deepseek-v4")
    native.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    # In saved files branches are `attn` and `ffn`; transformers calls them otherwise when it loads
    # them.
    names = {"self_attn": "attn", "mlp": "ffn"}
    convert(tmp_path / "saved", tmp_path / "ours", "deepseek-v4", native=False, branches=names)
    with pytest.warns(mhc_compile.MhcWarning, match="has hyper-connections .* was built without them"):
        loaded = type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    loaded.train().set_experts_implementation("batched_mm")
    mhc_compile.restore(loaded, tmp_path / "ours", options={"preset": "deepseek-v4"})
    call = torch.compile(loaded, backend="mhc", options={"preset": "deepseek-v4", "inner_backend": "eager"})
    assert relative(output(call(input_ids=inputs())), output(native(input_ids=inputs()))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPING)
def test_in_float64_they_are_to_the_last_digits(name):
    check(name, 1e-12, wide=True, inner_backend="eager")


@pytest.mark.slow
def test_sparse_attention_that_asks_for_nonzero(monkeypatch):
    monkeypatch.setitem(SHIPPING["glm5-next"].settings, "layer_types", ["linear_attention", "indexed_attention"])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check("glm5-next", 1e-5, inner_backend="eager")


@pytest.mark.slow
def test_in_compiled_kernels_too():
    check("deepseek-v4", 1e-5, inner_backend="inductor")
