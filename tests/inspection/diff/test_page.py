"""The page as text: what is in it, and that nothing of a model can become markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from itertools import pairwise

import pytest
from helpers.diff_fixtures import COMMENT, IMAGE, SCRIPT, activated, decoder, hostile, pieces

from mhc_compile.inspection.diff.page import render_page
from mhc_compile.inspection.diff.results import Change

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def data(page: str) -> dict:
    return json.loads(DATA.search(page)[1])


def test_the_data_is_that_of_the_json_report():
    found = data(render_page(decoder()))
    assert {name: found[name] for name in decoder().to_dict()} == json.loads(json.dumps(decoder().to_dict()))
    assert {entry["change"] for entry in found["legend"]} == {change.value for change in Change}


def test_every_row_is_in_one_group_and_equal_layers_refer_to_each_other():
    layers = data(render_page(decoder()))["layers"][0]
    places = sorted(place for layer in layers for place in layer["rows"])
    assert places == list(range(len(decoder().graphs[0].rows)))
    assert layers[0]["inputs"]
    assert [(layer["kind"], layer["like"]) for layer in layers if layer["path"] == "blocks.1"] == [
        ("Block", "blocks.0")
    ]


def test_every_graph_has_its_groups():
    assert [bool(layers) for layers in data(render_page(pieces()))["layers"]] == [True, True]


def test_names_cannot_become_markup():
    page = render_page(hostile())
    embedded = DATA.search(page)[1]
    assert not re.search("[<>&\u2028\u2029]", embedded)
    assert page.count("<script") == page.count("</script>") == 2
    assert IMAGE not in page
    found = data(page)  # and yet they are all there
    assert found["model"] == SCRIPT + IMAGE
    assert found["graphs"][0]["rejections"][0]["add"] == COMMENT


def test_page_loads_only_its_inline_script_and_style():
    page = render_page(decoder())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    for kind, tag in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        [text] = re.findall(tag, page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.search(r"""(?:src|href)=["'](?!data:)|@import|url\(|\bon\w+=|style=["']""", DATA.sub("", page))


@pytest.mark.parametrize(
    "word", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("]
)
def test_the_script_makes_no_markup_from_text(word):
    assert word not in DATA.sub("", render_page(decoder()))


def test_neighbours_that_do_not_change_are_one_group():
    [layers] = data(render_page(activated()))["layers"]
    rows = activated().graphs[0].rows
    quiet = [
        not layer["like"] and all(rows[place].change is Change.SAME for place in layer["rows"]) for layer in layers
    ]
    assert layers[1]["path"] == "stem"
    assert quiet[1]
    assert not any(one and other for one, other in pairwise(quiet[1:]))
