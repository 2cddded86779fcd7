"""`why`: single additions in full, compared with the attached model and with `explain`."""

from __future__ import annotations

import json
import linecache
import pickle
import subprocess
import sys

import pytest
import torch
from helpers.builders import LAYERS, Decoder, tokens
from torch import nn

import mhc_compile
import mhc_compile.errors
from mhc_compile.tools import zoo


def explain_add(node, model=None, *args, **options):
    return mhc_compile.why(model or Decoder(), *(args or (tokens(),)), node=node, options=options)


def test_details_of_a_site():
    (site,) = explain_add("blocks.1.mhc.attn").sites
    model = Decoder()
    mhc_compile.attach(model, tokens())
    attached = mhc_compile.connections(model)["blocks.1.mhc.attn"]
    assert site.parameters == {
        f"blocks.1.mhc.attn.{name}": tuple(value.shape) for name, value in attached.named_parameters()
    }
    assert (site.index, site.init_stream) == (attached.index, attached.index % 4) == (2, 2)
    assert (site.chain, site.chain_length) == (1, 2 * LAYERS)
    assert (site.previous, site.next) == ("blocks.0.mhc.mlp", "blocks.1.mhc.mlp")
    assert site.trunk_origin == "the sum of blocks.0.mhc.mlp"
    assert (site.trunk.value, site.skip, site.shortcut) == ("[2, 5, 8] float32", site.trunk, ())
    assert (site.width, site.axis) == (8, 2)
    assert site.axis_origin.startswith("the first operation of the branch")
    assert (site.owner, site.owner_kind, site.declaring_module) == ("blocks.1", "Block", "blocks.1.attn")
    ops = [operation.op for operation in site.branch_operations]
    assert ops.index("layer_norm") < ops.index("scaled_dot_product_attention")
    assert [o.op for o in site.branch_operations if o.contraction] == [
        "linear",
        "scaled_dot_product_attention",
        "linear",
    ]
    assert (site.adds, site.branch) == (1, "attn")
    assert site.source == site.add_operations[-1].source
    file, _, line = site.source.rpartition(":")
    assert site.code == linecache.getline(file, int(line)).strip() != ""


def test_the_first_and_the_last_site_and_no_preferred_stream():
    first, last = explain_add("blocks.0.mhc.attn"), explain_add(f"blocks.{LAYERS - 1}.mhc.mlp", init="random")
    assert first.sites[0].previous == last.sites[0].next == ""
    assert "the streams start as copies of it" in first.sites[0].trunk_origin
    assert (first.sites[0].init_stream, last.sites[0].init_stream) == (0, None)


def test_every_way_to_name_one_add():
    (site,) = explain_add("blocks.1.mhc.mlp").sites
    source = site.source
    for name in (site.add_operations[-1].node, site.branch_operations[0].node):
        assert explain_add(name).sites == (site,)
    at_line = explain_add(source.rpartition("/")[2]).sites
    assert [each.path for each in at_line] == [f"blocks.{layer}.mhc.mlp" for layer in range(LAYERS)]
    assert explain_add(source).sites == at_line
    assert [each.path for each in explain_add("blocks.1").sites] == ["blocks.1.mhc.attn", "blocks.1.mhc.mlp"]
    assert len(explain_add("blocks").sites) == 2 * LAYERS


class Scaled(nn.Module):
    """The branch splits the feature axis before its product, so only its result shows where the
    features are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            torn = x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)
            x = (x + layer(torn)) * 0.5
        return x


def test_lifted_operations_and_an_axis_found_from_the_last_contraction():
    (site,) = explain_add("mhc.layers.1", Scaled(), torch.randn(2, 6)).sites
    assert [operation.op for operation in site.lifted] == ["mul"]
    assert site.trunk_origin == "the sum of mhc.layers.0, after operations that run on all streams"
    assert "the last contraction of the branch" in site.axis_origin
    assert (site.owner, site.declaring_module) == ("", "layers.1")
    assert explain_add("layers.1", Scaled(), torch.randn(2, 6)).sites == (site,)  # the module that ends the branch


def test_details_of_a_rejection():
    model, args, kwargs = zoo.get("trap-cubic-gelu").build(2)
    (rejection,) = mhc_compile.why(model, *args, node="blocks.1", **kwargs).rejections
    known = [each for each in mhc_compile.explain(model, *args, **kwargs).rejections if each.module == rejection.module]
    assert rejection.add == rejection.add_operations[-1].node
    assert [(each.add, each.reason, each.message) for each in known] == [
        (rejection.add, rejection.reason, rejection.message)
    ]
    assert rejection.reason == "no-contraction"
    assert "tanh-GELU" in rejection.example
    assert "without weights" in rejection.meaning
    assert rejection.remedy.startswith("nothing")
    assert len(rejection.terms) == 2
    assert rejection.nearest == ""  # the only add of that module


def test_a_module_with_a_site_and_a_rejection():
    model, args, kwargs = zoo.get("trap-side-add").build(2)
    found = mhc_compile.why(model, *args, node="blocks.0", **kwargs)
    (site,) = found.sites
    assert len(found.rejections) == 1
    (rejection,) = found.rejections
    assert (site.path, rejection.reason) == ("blocks.0.mhc.f", "side-add")
    line = site.source.rpartition("/")[2]
    assert rejection.nearest == f"'{site.add_operations[-1].node}' is the site blocks.0.mhc.f ({line})"


def test_blocks_that_share_a_graph_have_details_each():
    model = Decoder()
    for block in model.blocks:
        block.compile(backend="eager")
    found = [explain_add(f"blocks.{layer}.mhc.mlp", model).sites for layer in range(LAYERS)]
    assert [len(sites) for sites in found] == [1] * LAYERS
    assert [sites[0].init_stream for sites in found] == [(2 * layer + 1) % 4 for layer in range(LAYERS)]


def test_a_program_has_the_details_of_its_model():
    program = torch.export.export(Decoder(), (tokens(),))
    (site,) = mhc_compile.why(program, node="blocks.1.mhc.mlp").sites
    (model,) = explain_add("blocks.1.mhc.mlp").sites
    for name in (
        "path",
        "parameters",
        "owner",
        "owner_kind",
        "previous",
        "index",
        "chain_length",
        "init_stream",
        "axis",
        "code",
    ):
        assert getattr(site, name) == getattr(model, name), name


def test_an_unknown_name_is_an_error_with_near_names():
    with pytest.raises(
        mhc_compile.errors.UnknownAddError, match=r"is called 'blocks.1.mhc.atn'.* near names: blocks.1.mhc.attn"
    ):
        explain_add("blocks.1.mhc.atn")
    with pytest.raises(LookupError, match="no addition of floating-point tensors"):
        explain_add("f", nn.Linear(2, 2), torch.randn(3, 2))
    for name in ("block", ""):
        with pytest.raises(mhc_compile.errors.UnknownAddError):
            explain_add(name)


def test_it_is_data_text_and_html():
    found = explain_add("blocks.1.mhc.attn")
    (site,) = json.loads(json.dumps(found.to_dict()))["sites"]
    assert site["parameters"]["blocks.1.mhc.attn.phi"] == [32, 24]
    html = found._repr_html_()
    assert html.startswith("<pre")
    assert "rewritten" in html
    assert "[32, 24]" in html


def test_the_model_is_not_changed():
    model = Decoder()
    explain_add("blocks.0", model)
    assert not mhc_compile.connections(model)


def test_an_unpickled_result_has_its_renderer(tmp_path):
    """Importing the result's class registers the renderer; nothing else of the package is
    needed.
    """
    found = explain_add("blocks.1.mhc.attn")
    (tmp_path / "found.pickle").write_bytes(pickle.dumps(found))
    script = "import pickle, rich; rich.print(pickle.load(open('found.pickle', 'rb')))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("blocks.1.mhc.attn: rewritten\n"), done.stderr
