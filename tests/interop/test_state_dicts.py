"""State dicts from native layouts into ours and back: names, shapes, order of residual logits, and
what is rejected.
"""

from __future__ import annotations

import pytest
import torch
from helpers.builders import Small, points
from helpers.native_states import NAMES, WIDTH, native_state, same

import mhc_compile
from mhc_compile import interop
from mhc_compile.config.presets import get_preset
from mhc_compile.errors import AttachError, CheckpointError, OptionError
from mhc_compile.interop.layout import Layout, Spelling
from mhc_compile.interop.layouts import LAYOUTS, get_layout, register_layout
from mhc_compile.interop.plan import UNUSED_SCALE
from mhc_compile.interop.planner import plan_to_native


@pytest.fixture(params=NAMES, ids="-".join)
def kind(request):
    return request.param


def test_there_and_back_is_the_same_to_the_bit(kind):
    preset, spelling = kind
    state = native_state(preset, spelling)
    ours = interop.from_native(state, preset)
    assert not same(ours, state)
    assert same(interop.to_native(ours, preset, spelling=spelling), state)
    if preset != "qwen4-exp":  # whose norm stands between the two projections that phi is made of
        assert list(interop.to_native(ours, preset, spelling=spelling)) == list(state)


def test_names_are_those_of_the_hyper_connections_of_the_branches(kind):
    preset, spelling = kind
    *_, first, second = NAMES[kind]
    ours = interop.from_native(native_state(preset, spelling), preset)
    paths = {name.rpartition(".")[0] for name in ours if ".mhc." in name}
    wanted = {f"model.layers.{layer}.mhc.{branch}" for layer in range(12) for branch in (first, second)}
    # The read-out belongs to the last site of the last block: number 11, not 9.
    assert paths == wanted | (
        {f"model.layers.11.mhc.{second}.read_out"} if get_preset(preset).read_out == "learned" else set()
    )


def test_entries_of_the_model_itself_are_the_same_tensors(kind):
    preset, spelling = kind
    state = native_state(preset, spelling)
    ours = interop.from_native(state, preset)
    for name in ("model.embed.weight", f"model.layers.3.{NAMES[kind][-1]}.weight", "lm_head.weight"):
        assert ours[name] is state[name]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_residual_logits_change_places_across_the_diagonal(n):
    state = native_state("deepseek-v4", layers=1, n=n)
    ours = interop.from_native(state, "deepseek-v4")
    fn, phi = state["model.layers.0.ffn_hc.fn"], ours["model.layers.0.mhc.mlp.phi"]
    base, bias = state["model.layers.0.ffn_hc.base"], ours["model.layers.0.mhc.mlp.bias"]
    assert torch.equal(phi[:, : 2 * n], fn[: 2 * n].t())
    assert torch.equal(bias[: 2 * n], base[: 2 * n])
    for i in range(n):
        for j in range(n):
            assert torch.equal(phi[:, 2 * n + i * n + j], fn[2 * n + j * n + i])
            assert bias[2 * n + i * n + j] == base[2 * n + j * n + i]


def test_the_blocks_of_multi_token_prediction_are_chains_of_their_own():
    state = native_state("deepseek-v4", "published", layers=2)
    renamed = {name.removeprefix("model."): value for name, value in state.items()}
    mtp = {f"mtp.0.{name.removeprefix('layers.1.')}": v for name, v in renamed.items() if name.startswith("layers.1.")}
    mtp |= {f"mtp.0.{name}": v for name, v in renamed.items() if name.startswith("hc_head")}
    ours = interop.from_native(renamed | mtp, "deepseek-v4")
    assert {name.rpartition(".")[0] for name in ours if "read_out" in name} == {
        "layers.1.mhc.ffn.read_out",
        "mtp.0.mhc.ffn.read_out",
    }
    assert same(interop.to_native(ours, "deepseek-v4", spelling="published"), renamed | mtp)


def test_a_compiled_model_s_prefix_is_left_out():
    ours = {f"_orig_mod.{name}": v for name, v in interop.from_native(native_state("hy-v4"), "hy-v4").items()}
    assert interop.to_native(ours, "hy-v4").keys() == native_state("hy-v4").keys()


def test_branches_with_other_names_are_translated():
    state = native_state("glm5-next")
    branches = {"attn": "self_attn", "feed_forward": "mlp"}
    ours = interop.from_native(state, "glm5-next", branches=branches)
    assert "model.layers.0.mhc.feed_forward.phi" in ours
    assert same(interop.to_native(ours, "glm5-next", branches=branches), state)
    with pytest.raises(
        CheckpointError, match=r"branch called 'attn'.*'self_attn' is attn_hc.*branches=\{'attn': 'self_attn'\}"
    ):
        interop.to_native(ours, "glm5-next")


def without(state, end):
    return {name: value for name, value in state.items() if not name.endswith(end)}


def changed(state, end, change):
    return {name: change(value) if name.endswith(end) else value for name, value in state.items()}


def turned(value):
    return value.t()


TWO = native_state("qwen4-exp") | {"model.layers.3.self_attn.q.weight": torch.ones(1)}
LONG = changed(native_state("glm5-next", n=3), "attn_hc.fn", turned)


@pytest.mark.parametrize(
    ("state", "preset", "words"),
    [
        (native_state("hy-v4"), "deepseek-v4", r"fn \[8, 24\].*expected fn \[n\(n\+2\), n C\].*are those of 'hy-v4'"),
        (native_state("deepseek-v4"), "hy-v4", r"fn \[24, 24\].*expected fn \[2n, n C\].*are those of 'deepseek-v4'"),
        (native_state("deepseek-v4"), "glm5-next", r"hc_head\.hc_fn.*are those of 'deepseek-v4'"),
        (native_state("glm5-next"), "deepseek-v4", r"no read-out.*are those of 'glm5-next'"),
        (native_state("qwen4-exp"), "deepseek-v4", r"none of the .* has a name such as attn_hc\.fn.*are those of 'qwen4-exp'"),
        (LONG, "glm5-next", r"attn_hc\.\* has fn \[18, 15\].*if the projection were transposed"),
        (without(native_state("glm5-next"), "layers.7.ffn_hc.base"), "glm5-next", r"layers\.7\.ffn_hc\.\* has fn, scale and no base"),
        (native_state("glm5-next") | native_state("glm5-next", "saved"), "glm5-next", r"is an entry of .* spell it"),
        (interop.from_native(native_state("glm5-next"), "glm5-next"), "glm5-next", r"in our layout already"),
        (TWO, "qwen4-exp", r"may belong to any of the branches self_attn, linear_attn of 'model\.layers\.3'"),
    ],
)  # fmt: skip
def test_checkpoint_of_another_preset_is_rejected(state, preset, words):
    with pytest.raises(CheckpointError, match=words):
        interop.from_native(state, preset)


OURS = {preset: interop.from_native(native_state(preset), preset) for preset in LAYOUTS}


@pytest.mark.parametrize(
    ("state", "preset", "words"),
    [
        (OURS["hy-v4"], "deepseek-v4", r"mlp\.read_out\.weight of 4; a model.*fit 'hy-v4'"),
        (OURS["deepseek-v4"], "glm5-next", r"is a learned read-out.*mean.*fit 'deepseek-v4'"),
        (OURS["glm5-next"], "deepseek-v4", r"there is no read-out.*fit 'glm5-next'"),
        (OURS["qwen4-exp"], "hy-v4", r"'model\.layers\.0\.mhc\.linear_attn\.norm' has no counterpart.*fit 'qwen4-exp'"),
        (OURS["hy-v4"], "glm5-next", r"is a learned read-out.*fit 'hy-v4'"),
        (native_state("glm5-next"), "glm5-next", r"none of the .* plain model, or in a native layout already"),
        (changed(interop.from_native(native_state("glm5-next", n=3), "glm5-next"), "phi", turned), "glm5-next", r"if the projection were transposed"),
        (without(OURS["hy-v4"], "layers.2.mhc.mlp.scale"), "hy-v4", r"layers\.2\.mhc\.mlp has phi, bias and no scale"),
        (OURS["hy-v4"] | {"model.layers.0.ffn_hc.fn": torch.ones(1)}, "hy-v4", r"would both become 'model\.layers\.0\.ffn_hc\.fn'"),
    ],
)  # fmt: skip
def test_parameters_without_native_counterpart_are_rejected(state, preset, words):
    with pytest.raises(CheckpointError, match=words):
        interop.to_native(state, preset)


def test_presets_without_files_and_unknown_spellings_are_wrong_options():
    with pytest.raises(OptionError, match=r"preset 'paper' has no layout.*deepseek-v4"):
        interop.to_native({}, "paper")
    with pytest.raises(OptionError, match=r"did you mean 'deepseek-v4'"):
        interop.from_native({}, "deepseek-4")
    with pytest.raises(OptionError, match=r"spelling 'hub'.*'transformers', 'saved'"):
        interop.to_native(OURS["hy-v4"], "hy-v4", spelling="hub")


def test_nothing_reads_the_third_scale_that_hy_v4_does_not_have():
    ours = interop.from_native(native_state("hy-v4"), "hy-v4")
    assert ours["model.layers.0.mhc.mlp.scale"].shape == (3,)
    assert ours["model.layers.0.mhc.mlp.scale"][2] == UNUSED_SCALE
    what = plan_to_native({name: tuple(v.shape) for name, v in ours.items()}, "hy-v4").changes
    assert "a_res left out" in what["model.layers.0.ffn_hc.scale"].what


BRANCHES = {"first": "self_attn", "second": "mlp"}


def attached(preset, **options):
    model = Small(WIDTH)
    mhc_compile.attach(model, points(), options={"preset": preset, **options})
    return model


@pytest.mark.parametrize("preset", ["deepseek-v4", "glm5-next", "hy-v4"])
def test_a_model_gives_and_takes_a_native_state_dict(preset):
    model, other = attached(preset), attached(preset)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for connection in mhc_compile.connections(model).values():
        if preset == "hy-v4":
            connection.scale.data[2] = UNUSED_SCALE
    native = interop.export_state_dict(model, preset, branches=BRANCHES)
    assert {name for name in native if "_hc." in name} == {
        f"pair.{site}.{name}" for site in ("attn_hc", "ffn_hc") for name in ("fn", "base", "scale")
    }
    assert ("hc_head.hc_fn" in native) == (preset != "glm5-next")
    result = interop.import_state_dict(other, native, preset, branches=BRANCHES)
    assert not result.missing_keys
    assert same(other.state_dict(), model.state_dict())


def test_native_values_are_those_of_logits_of_speed_1():
    preset, slow = "deepseek-v4", attached("deepseek-v4")
    for parameter in slow.parameters():
        torch.nn.init.normal_(parameter)
    fast, other = (attached(preset, gate_speed=8.0, scale_speed=0.25) for _ in range(2))
    fast.load_state_dict(slow.state_dict())
    assert not same(fast.state_dict(), slow.state_dict())
    native = interop.export_state_dict(slow, preset, branches=BRANCHES)
    assert same(interop.export_state_dict(fast, preset, branches=BRANCHES), native)
    interop.import_state_dict(other, native, preset, branches=BRANCHES)
    assert same(other.state_dict(), fast.state_dict())
    other = attached(preset, gate_speed=8.0, scale_speed=0.25)
    other.load_state_dict(interop.from_native(native, preset, branches=BRANCHES))
    assert same(other.state_dict(), fast.state_dict())


def test_a_model_without_hyper_connections_or_with_another_preset_s_is_rejected():
    native = interop.export_state_dict(attached("deepseek-v4"), "deepseek-v4", branches=BRANCHES)
    with pytest.raises(AttachError, match=r"Small has no hyper-connections.*options=\{'preset': 'deepseek-v4'\}"):
        interop.import_state_dict(Small(WIDTH), native, "deepseek-v4", branches=BRANCHES)
    with pytest.raises(CheckpointError, match=r"pair\.mhc\.first was saved by a model with preset='glm5-next'"):
        interop.to_native(attached("glm5-next", read_out="learned").state_dict(), "deepseek-v4", branches=BRANCHES)
    for act in (
        lambda model: interop.import_state_dict(model, native, "deepseek-v4", branches=BRANCHES),
        lambda model: interop.export_state_dict(model, "deepseek-v4", branches=BRANCHES),
    ):
        with pytest.raises(AttachError, match=r"pair\.mhc\.first was attached with preset='glm5-next'.*'deepseek-v4'"):
            act(attached("glm5-next"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda native: {n: v for n, v in native.items() if "ffn_hc" not in n},
            "Small has .* that the checkpoint lacks",
        ),
        (
            lambda native: (
                native | {n.replace("pair", "more"): v for n, v in native.items() if "_hc." in n and "pair" in n}
            ),
            r"the checkpoint has .*more\.mhc\.first.* that Small lacks",
        ),
    ],
)
def test_sites_without_a_counterpart_are_named(change, words):
    model = attached("glm5-next")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    native = change(interop.export_state_dict(attached("glm5-next"), "glm5-next", branches=BRANCHES))
    with pytest.raises(AttachError, match=words):
        interop.import_state_dict(model, native, "glm5-next", branches=BRANCHES)
    assert same(model.state_dict(), before)


def test_another_mapping_of_the_same_size_is_rejected():
    model = attached("glm5-next", mapping="unconstrained")
    with pytest.raises(AttachError, match=r"mapping='unconstrained', and the same numbers stand for another function"):
        interop.export_state_dict(model, "glm5-next", branches=BRANCHES)
    with pytest.raises(CheckpointError, match=r"with mapping='unconstrained', not 'sinkhorn'"):
        interop.to_native(model.state_dict(), "glm5-next", branches=BRANCHES)


def test_registered_layout_is_used():
    layout = Layout(
        preset="paper",
        source="here",
        site=get_layout("glm5-next").site,
        spellings=(Spelling(name="mine", sites={"a.{}": ("attn",), "f.{}": ("mlp",)}),),
    )
    try:
        register_layout(layout)
        with pytest.raises(OptionError, match="has another layout already"):
            register_layout(Layout(preset="paper", source="there", site=(), spellings=()))
        state = {
            f"0.{site}.{name}": torch.randn(shape)
            for site in "af"
            for name, shape in (("fn", (8, 12)), ("base", (8,)), ("scale", (3,)))
        }
        ours = interop.from_native(state, "paper")
        assert torch.equal(ours["0.mhc.attn.phi"], state["0.a.fn"].t())
        assert same(interop.to_native(ours, "paper", spelling="mine"), state)
    finally:
        LAYOUTS.pop("paper", None)
