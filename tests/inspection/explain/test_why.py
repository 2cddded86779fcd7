"""`why`: the full story of one add, against what the attached model has and what the rejections say."""

from __future__ import annotations

import json
import linecache

import pytest
import torch
from helpers.builders import LAYERS, Decoder, tokens
from torch import nn

import mhc_compile
from mhc_compile.tools import zoo


def tell(node, model=None, *args, **options):
    return mhc_compile.why(model or Decoder(), *(args or (tokens(),)), node=node, options=options)


def test_the_story_of_a_site():
    (site,) = tell("blocks.1.mhc.attn").sites
    model = Decoder()
    mhc_compile.attach(model, tokens())
    attached = mhc_compile.connections(model)["blocks.1.mhc.attn"]
    assert {weight.path: weight.shape for weight in site.parameters} == {
        f"blocks.1.mhc.attn.{name}": tuple(value.shape) for name, value in attached.named_parameters()
    }
    assert (site.index, site.stream) == (attached.index, attached.index % 4) == (2, 2)
    assert (site.chain, site.sites) == (1, 2 * LAYERS)
    assert (site.previous, site.following) == ("blocks.0.mhc.mlp", "blocks.1.mhc.mlp")
    assert site.trunk_from == "the sum of blocks.0.mhc.mlp"
    assert (site.trunk.value, site.skip, site.shortcut) == ("[2, 5, 8] float32", site.trunk, ())
    assert (site.width, site.axis) == (8, 2)
    assert site.axis_from.startswith("the first operation of the branch")
    assert (site.owner, site.owner_kind, site.declaring_module) == ("blocks.1", "Block", "blocks.1.attn")
    ops = [operation.op for operation in site.branch]
    assert ops.index("layer_norm") < ops.index("scaled_dot_product_attention")
    assert [o.op for o in site.branch if o.product] == ["linear", "scaled_dot_product_attention", "linear"]
    file, _, line = site.adds[-1].source.rpartition(":")
    assert site.code == linecache.getline(file, int(line)).strip() != ""


def test_the_first_and_the_last_site_and_no_preferred_stream():
    first, last = tell("blocks.0.mhc.attn"), tell(f"blocks.{LAYERS - 1}.mhc.mlp", init="random")
    assert first.sites[0].previous == last.sites[0].following == ""
    assert "the streams begin as copies of it" in first.sites[0].trunk_from
    assert (first.sites[0].stream, last.sites[0].stream) == (0, None)


def test_every_way_to_name_one_add():
    (site,) = tell("blocks.1.mhc.mlp").sites
    source = site.adds[-1].source
    for name in (site.adds[-1].node, site.branch[0].node):
        assert tell(name).sites == (site,)
    at_line = tell(source.rpartition("/")[2]).sites
    assert [each.path for each in at_line] == [f"blocks.{layer}.mhc.mlp" for layer in range(LAYERS)]
    assert tell(source).sites == at_line
    assert [each.path for each in tell("blocks.1").sites] == ["blocks.1.mhc.attn", "blocks.1.mhc.mlp"]
    assert len(tell("blocks").sites) == 2 * LAYERS


class Scaled(nn.Module):
    """The branch tears the features apart before it multiplies them, so that only its last product tells where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            torn = x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)
            x = (x + layer(torn)) * 0.5
        return x


def test_lifted_operations_and_an_axis_that_the_last_product_tells():
    (site,) = tell("mhc.layers.1", Scaled(), torch.randn(2, 6)).sites
    assert [operation.op for operation in site.lifted] == ["mul"]
    assert site.trunk_from == "the sum of mhc.layers.0, by operations that run on the streams"
    assert "the last product of the branch" in site.axis_from
    assert (site.owner, site.declaring_module) == ("", "layers.1")
    assert tell("layers.1", Scaled(), torch.randn(2, 6)).sites == (site,)  # the module that ends the branch


def test_the_story_of_a_rejection():
    model, args, kwargs = zoo.get("trap-cubic-gelu").build(2)
    (rejection,) = mhc_compile.why(model, *args, node="blocks.1", **kwargs).rejections
    known = [each for each in mhc_compile.explain(model, *args, **kwargs).rejections if each.module == rejection.module]
    assert [(each.add, each.reason, each.message) for each in known] == [
        (rejection.adds[-1].node, rejection.reason, rejection.message)
    ]
    assert rejection.reason == "no-contraction"
    assert "tanh-GELU" in rejection.example
    assert "without weights" in rejection.meaning
    assert rejection.remedy.startswith("nothing")
    assert len(rejection.terms) == 2
    assert rejection.nearest == ""  # the only add of that module


def test_a_module_with_a_site_and_a_rejection_tells_both():
    model, args, kwargs = zoo.get("trap-side-add").build(2)
    story = mhc_compile.why(model, *args, node="blocks.0", **kwargs)
    (site,) = story.sites
    assert len(story.rejections) == 1
    (rejection,) = story.rejections
    assert (site.path, rejection.reason) == ("blocks.0.mhc.f", "side-add")
    line = site.adds[-1].source.rpartition("/")[2]
    assert rejection.nearest == f"'{site.adds[-1].node}' is the site blocks.0.mhc.f ({line})"


def test_blocks_that_share_a_graph_have_stories_of_their_own():
    model = Decoder()
    for block in model.blocks:
        block.compile(backend="eager")
    stories = [tell(f"blocks.{layer}.mhc.mlp", model).sites for layer in range(LAYERS)]
    assert [len(sites) for sites in stories] == [1] * LAYERS
    assert [sites[0].stream for sites in stories] == [(2 * layer + 1) % 4 for layer in range(LAYERS)]


def test_a_program_tells_the_same():
    program = torch.export.export(Decoder(), (tokens(),))
    (told,) = mhc_compile.why(program, node="blocks.1.mhc.mlp").sites
    (model,) = tell("blocks.1.mhc.mlp").sites
    for name in ("path", "parameters", "owner", "owner_kind", "previous", "index", "sites", "stream", "axis", "code"):
        assert getattr(told, name) == getattr(model, name), name


def test_an_unknown_name_is_an_error_with_near_names():
    with pytest.raises(
        mhc_compile.UnknownAddError, match=r"is called 'blocks.1.mhc.atn'.* near names: blocks.1.mhc.attn"
    ):
        tell("blocks.1.mhc.atn")
    with pytest.raises(LookupError, match="no addition of floating-point tensors"):
        tell("f", nn.Linear(2, 2), torch.randn(3, 2))
    for name in ("block", ""):
        with pytest.raises(mhc_compile.UnknownAddError):
            tell(name)


def test_it_is_data_text_and_html():
    story = tell("blocks.1.mhc.attn")
    assert json.loads(json.dumps(story.to_dict()))["sites"][0]["parameters"][0]["shape"] == [32, 24]
    html = story._repr_html_()
    assert html.startswith("<pre")
    assert "becomes a hyper-connection" in html
    assert "[32, 24]" in html


def test_nothing_of_the_model_changes():
    model = Decoder()
    tell("blocks.0", model)
    assert not mhc_compile.connections(model)
