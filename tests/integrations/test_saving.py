"""What peft and transformers save and load contains the hyper-connections, or a warning says so."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.builders import Decoder, build, tokens, twin
from helpers.gates import scatter

import mhc_compile
from mhc_compile.integrations.saving import AfterImport, register_with_peft, register_with_transformers

EAGER = {"inner_backend": "eager"}


def stirred(model):
    scatter(model, 0.5, add=True)
    return model


def own(model):
    return {name: value for name, value in model.state_dict().items() if ".mhc." in name}


def assert_equal(one, two):
    assert own(one).keys() == own(two).keys()
    assert own(one)
    for name, value in own(one).items():
        assert torch.equal(value, own(two)[name]), name


# peft


def adapted(base):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["out", "qkv"]))


def peft_model():
    return pytest.importorskip("peft").PeftModel


@pytest.fixture
def trained():
    """A plain model, and an adapter of it with hyper-connections."""
    plain = Decoder()
    model = adapted(twin(plain))
    mhc_compile.attach(model, tokens(), options=EAGER)
    return plain, stirred(model)


@pytest.mark.parametrize("safe", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_adapter_has_the_hyper_connections_of_its_model(trained, tmp_path, safe):
    plain, model = trained
    model.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = peft_model().from_pretrained(twin(plain), tmp_path)
    assert_equal(loaded, model)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    want = torch.compile(model, backend="mhc", options=EAGER)(tokens())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(loaded, backend="mhc", options=EAGER)(tokens()), want)
    again = peft_model().from_pretrained(twin(plain), tmp_path, is_trainable=True)
    assert all(parameter.requires_grad for c in mhc_compile.connections(again).values() for parameter in c.parameters())


def test_restore_reads_an_adapter_for_the_model_without_one(trained, tmp_path):
    plain, model = trained
    model.save_pretrained(tmp_path)
    found = mhc_compile.restore(plain, tmp_path)
    assert list(found) == [f"blocks.{layer}.mhc.{branch}" for layer in range(2) for branch in ("attn", "mlp")]
    assert_equal(plain, model.get_base_model())


@pytest.mark.slow
def test_merging_keeps_them(trained):
    _, model = trained
    want = torch.compile(model, backend="mhc", options=EAGER)(tokens())
    merged = model.merge_and_unload()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(merged, backend="mhc", options=EAGER)(tokens()), want)


def test_two_adapters_share_them_and_a_warning_says_so(trained, tmp_path):
    plain, model = trained
    model.save_pretrained(tmp_path / "one")
    stirred(model).save_pretrained(tmp_path / "two")
    loaded = peft_model().from_pretrained(twin(plain), tmp_path / "one")
    loaded.load_adapter(tmp_path / "one", "same")
    with pytest.warns(mhc_compile.MhcWarning, match="adapter 'two' has other values for the hyper-connections"):
        loaded.load_adapter(tmp_path / "two", "two")
    assert_equal(loaded, model)


def test_an_adapter_without_them_leaves_the_model_alone(tmp_path):
    plain = Decoder()
    adapted(twin(plain)).save_pretrained(tmp_path)
    model = twin(plain)
    mhc_compile.attach(model, tokens())
    before = own(stirred(model))
    with pytest.warns(mhc_compile.MhcWarning, match="keep the values they have"):
        loaded = peft_model().from_pretrained(model, tmp_path)
    assert not mhc_compile.connections(peft_model().from_pretrained(plain, tmp_path))
    for name, value in before.items():
        assert torch.equal(own(loaded)[f"base_model.model.{name}"], value)


def test_registering_twice_changes_nothing():
    peft = pytest.importorskip("peft")
    before = peft.get_peft_model_state_dict
    register_with_peft()
    assert peft.get_peft_model_state_dict is before
    assert peft.peft_model.get_peft_model_state_dict is before


# transformers


def test_from_pretrained_says_what_it_leaves_out(tmp_path):
    transformers = pytest.importorskip("transformers")
    register_with_transformers()
    case = build("gpt2", 1)
    case.model.save_pretrained(tmp_path / "plain")
    mhc_compile.attach(case.model, **case.inputs)
    stirred(case.model).save_pretrained(tmp_path / "mhc")
    words = r"mhc has hyper-connections \(.*(phi|bias|scale), \.\.\.\).*mhc_compile\.restore\(model, '.*mhc'\)"
    with pytest.warns(mhc_compile.MhcWarning, match=words):
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mhc", output_loading_info=True)
    assert {name for name in own(case.model) if name.endswith("phi")} <= set(info["unexpected_keys"])
    mhc_compile.restore(loaded, tmp_path / "mhc")
    assert_equal(loaded, case.model)
    with pytest.warns(mhc_compile.MhcWarning, match="GPT2Model was built without them"):
        inner = transformers.GPT2Model.from_pretrained(tmp_path / "mhc")
    mhc_compile.restore(inner, tmp_path / "mhc")
    assert_equal(inner, case.model.transformer)
    assert isinstance(transformers.GPT2Model.from_pretrained(tmp_path / "plain"), transformers.GPT2Model)


@pytest.mark.slow
def test_an_adapter_that_transformers_loads_without_them_says_so(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    case = build("gpt2", 1)
    case.model.save_pretrained(tmp_path / "plain")
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "plain")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    mhc_compile.attach(model, **case.inputs)
    stirred(model).save_pretrained(tmp_path / "adapter")
    with pytest.warns(mhc_compile.MhcWarning, match=r"restore\(model, '.*adapter'\)") as caught:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert sum(issubclass(one.category, mhc_compile.MhcWarning) for one in caught) == 1
    mhc_compile.restore(loaded, tmp_path / "adapter")
    assert_equal(loaded, model.get_base_model())


# Packages that are imported before or after this one

PACKAGE = """
class PreTrainedModel:
    def load_adapter(self, path=None):
        pass

    @classmethod
    def from_pretrained(cls, path, output_loading_info=False):
        return (cls(), {"unexpected_keys": ["h.0.mhc.attn.phi"]}) if output_loading_info else cls()
"""


@pytest.mark.parametrize(
    "lines",
    [
        ("import mhc_compile", "import transformers.modeling_utils"),
        ("import transformers.modeling_utils", "import mhc_compile"),
        (
            "import mhc_compile, importlib.util",
            "assert importlib.util.find_spec('transformers.modeling_utils')",
            "import transformers.modeling_utils",
        ),
    ],
)
def test_the_order_of_imports_does_not_matter(tmp_path, lines):
    """In a fresh process, without torch, with a package of the same names."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    (tmp_path / "transformers" / "modeling_utils.py").write_text(PACKAGE)
    check = (
        "import sys; sys.path.insert(0, sys.argv[1])",
        *lines,
        "load = transformers.modeling_utils.PreTrainedModel.from_pretrained",
        "assert hasattr(load, '_mhc_registered')",
        "assert 'torch' not in sys.modules",
        "assert transformers.modeling_utils.__loader__.exec_module.__qualname__.startswith('_LoaderBasics')",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(check), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_other_modules_are_not_looked_at():
    finder = AfterImport()
    assert finder.find_spec("json") is None
    assert {"peft", "transformers.modeling_utils"} < finder.waiting
