"""The drawings: what is in them, and that their readers can read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from xml.etree import ElementTree

import pytest
from helpers.diff_fixtures import COMMENT, IMAGE, SCRIPT, activated, alone, decoder, hostile, nested, pieces, unchanged

from mhc_compile.inspection.diff.drawing import mermaid_text, to_dot, to_mermaid
from mhc_compile.inspection.diff.drawing_svg import to_svg
from mhc_compile.inspection.diff.picture import Part, sketch

SVG = "{http://www.w3.org/2000/svg}"
ALL = [decoder, activated, nested, pieces, hostile, alone, unchanged]
each = pytest.mark.parametrize("made", ALL, ids=lambda made: made.__wrapped__.__name__)


def parts(diff):
    return [part for picture in sketch(diff).pictures for trunk in picture.trunks for part in trunk.parts]


def test_layers_that_are_alike_are_drawn_once():
    first, second, rest = parts(decoder(24))
    assert [first.lines[0], second.lines[0]] == ["blocks.0.attn", "blocks.0.mlp"]
    assert rest == Part("repeat", ("× 23: as blocks.0",), 46)


@each
def test_every_site_is_drawn_or_counted(made):
    counted = sum(part.sites + part.holds for part in parts(made()))
    assert counted == sum(len(chain.sites) for graph in made().graphs for chain in graph.chains)


def test_an_operation_on_the_trunk_is_drawn_where_it_is():
    before, relu, after = parts(activated())
    assert [before.kind, after.kind] == ["site", "site"]
    assert relu == Part("lifted", ("relu",))


def test_a_chain_inside_a_branch_is_counted_in_its_box():
    assert [(part.path, part.holds) for part in parts(nested())] == [("1.mhc.deep", 2), ("1.mhc.flat", 0)]


def test_rejected_additions_are_noted():
    [picture] = sketch(alone()).pictures
    assert picture.trunks == ()
    assert picture.notes == ("skipped: 2 × chain-too-short (x, add_1)",)


# SVG


@each
def test_the_svg_is_whole_and_stands_alone(made):
    text = to_svg(made())
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.find(f"{SVG}title").text
    assert root.find(f"{SVG}desc").text == sketch(made()).description
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "desc", "style", "g", "rect", "circle", "line", "path", "text",
    }  # fmt: skip
    assert not re.search(r"href|url\(|@import|<script", text)


@each
def test_the_svg_has_a_box_for_each_site_on_either_side_and_a_line_for_each_stream(made):
    root = ElementTree.fromstring(to_svg(made()))
    kinds = Counter(element.get("class") for element in root.iter())
    drawn = sketch(made())
    trunks = [trunk for picture in drawn.pictures for trunk in picture.trunks]
    assert kinds["site"] == kinds["box"] == 2 * sum(part.kind == "site" for trunk in trunks for part in trunk.parts)
    assert kinds["add"] == kinds["update"] == kinds["site"] // 2
    assert kinds["trunk"] == len(trunks)
    assert kinds["stream"] == len(trunks) * drawn.streams


def test_svg_has_a_title_and_a_description():
    texts = [element.text for element in ElementTree.fromstring(to_svg(nested())).iter(f"{SVG}text")]
    assert "Nested · holds 2 more sites" in texts
    assert {"copies: 1 → 4", "mean: 4 → 1", "pre", "res", "post", "before", "after"} <= set(texts)
    many = ElementTree.fromstring(to_svg(decoder(24)))
    assert [element.text for element in many.iter(f"{SVG}text")].count("× 23: as blocks.0") == 2
    assert "Nothing is rewritten." in to_svg(unchanged())


def test_markup_in_names_is_text():
    root = ElementTree.fromstring(to_svg(hostile()))
    assert f"{SCRIPT}.mhc.f" in [element.text for element in root.iter(f"{SVG}title")]


def test_texts_fit_into_their_boxes(browser, tmp_path):
    for diff in (decoder(), nested(), activated(), hostile()):
        (tmp_path / "drawing.svg").write_text(to_svg(diff), encoding="utf-8")
        browser.get((tmp_path / "drawing.svg").as_uri())
        over = browser.execute_script(
            """
            const right = document.documentElement.getBoundingClientRect().right;
            const wide = [...document.querySelectorAll('svg > text')].filter(text => text.getBoundingClientRect().right > right);
            for (const site of document.querySelectorAll('.site')) {
              const box = site.querySelector('.box').getBoundingClientRect();
              for (const text of site.querySelectorAll('text')) {
                const own = text.getBoundingClientRect();
                const inside = Number(text.getAttribute('x')) > site.querySelector('.box').x.baseVal.value;
                if (inside && (own.left < box.left || own.right > box.right)) wide.push(text);
              }
            }
            return wide.map(text => text.textContent);
            """
        )
        assert over == []


# Graphviz


@each
def test_graphviz_reads_it(made):
    program = shutil.which("dot")
    if program is None:
        pytest.skip("needs Graphviz: apt-get install graphviz")
    result = subprocess.run([program, "-Tsvg"], input=to_dot(made()), capture_output=True, text=True, check=True)
    assert result.stderr == ""
    root = ElementTree.fromstring(result.stdout)
    kinds = Counter(element.get("class") for element in root.iter())
    assert kinds["cluster"] == sum(1 + bool(picture.trunks) for picture in sketch(made()).pictures)
    texts = "".join(text for element in root.iter(f"{SVG}text") for text in element.itertext())
    for part in parts(made()):
        if part.kind == "site":
            assert texts.replace("\xa0", " ").count(part.lines[0]) >= 2


def test_graphviz_draws_a_line_for_each_stream():
    assert ":invis:".join(["#0a8296"] * 4) in to_dot(decoder())
    assert "#0a8296:invis" not in to_dot(decoder()).partition("cluster_1")[0]


def test_quotes_and_backslashes_stay_inside_their_strings():
    text = to_dot(hostile())
    strings = re.findall(r'"(?:[^"\\]|\\.)*"', text)
    assert any(COMMENT.split("\u2028")[0].replace("&", "&amp;") in string for string in strings)
    assert not re.search("[<&]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text))


# Mermaid

_LABEL = r'"[^"<>`\\]*(?:<br/>[^"<>`\\]*)*"'
_LINES = (
    r"flowchart TB",
    r"  acc(?:Title|Descr): [^;#<>{}\"]+",
    rf"  subgraph s\d+\[{_LABEL}\]",
    r"  end",
    rf"    [ab]\d+_\d+(?:\(\[{_LABEL}\]\)|\[{_LABEL}\]|\(\({_LABEL}\)\)|\[\[{_LABEL}\]\]|>{_LABEL}\])(?::::note)?",
    r"    [ab]\d+_\d+ (?:-->|==>|~~~)(?:\|[\w ,]+\|)? [ab]\d+_\d+",
    rf"  nothing\[{_LABEL}\]",
    r"  classDef note [\w:, -]+",
)


@each
def test_mermaid_has_only_lines_that_the_language_knows(made):
    lines = to_mermaid(made()).splitlines()
    assert lines[0] == "flowchart TB"
    for line in lines:
        assert any(re.fullmatch(pattern, line) for pattern in _LINES), line
    assert sum(line.startswith("  subgraph") for line in lines) == lines.count("  end")


@each
def test_mermaid_s_arrows_join_boxes_that_exist(made):
    text = to_mermaid(made())
    boxes = re.findall(r"^    ([ab]\d+_\d+)[\[(>]", text, re.MULTILINE)
    assert len(boxes) == len(set(boxes))
    ends = re.findall(r"^    (\w+) (?:-->|==>|~~~)(?:\|.*?\|)? (\w+)$", text, re.MULTILINE)
    assert {name for pair in ends for name in pair} <= set(boxes)
    branches = sum(part.kind == "site" for part in parts(made()))
    assert text.count('(("hyper-connection"))') == text.count('(("add"))') == branches
    assert text.count("|pre|") == text.count("|post|") == branches


def test_mermaid_escapes_its_own_syntax():
    assert mermaid_text('a"b<c>&#`\\\u2028') == '"a#34;b#60;c#62;#38;#35;#96;#92;#8232;"'
    assert IMAGE not in to_mermaid(hostile())
