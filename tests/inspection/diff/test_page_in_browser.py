"""The page in a browser: it is opened from a file, clicked, typed at and looked at."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from helpers.diff_fixtures import COMMENT, decoder, graphless, hostile, pieces, unchanged

from mhc_compile.inspection.diff.page import render_page

pytest.importorskip("selenium", reason='needs selenium: pip install -e ".[dev]"')
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

FIRST = "blocks.0.mhc.attn"


class Page:
    def __init__(self, browser, path):
        self.browser = browser
        self.path = path

    def open(self, diff, fragment=""):
        self.path.write_text(render_page(diff), encoding="utf-8")
        self.browser.get("about:blank")
        self.browser.get_log("browser")
        self.browser.get(f"{self.path.as_uri()}{fragment}")
        return self

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        [found] = self.all(selector)
        return found

    def js(self, text, *arguments):
        return self.browser.execute_script(f"return {text}", *arguments)

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    @property
    def selected(self):
        """The names of the selected cells, before and after."""
        return self.js(
            "[...document.querySelectorAll('.cell[aria-selected=true]')].map(c => [c.dataset.side, c.querySelector('.text').textContent])"
        )

    @property
    def rows(self):
        return len(self.all("#rows .row"))

    def seen(self, selector):
        """Whether the element lies inside the part of the list that is scrolled into view."""
        return self.js(
            "(s => { const e = document.querySelector(s).getBoundingClientRect(), b = document.getElementById('rows').getBoundingClientRect();"
            " return e.height > 0 && e.top >= b.top && e.bottom <= b.bottom; })(arguments[0])",
            selector,
        )

    def wait(self, condition):
        WebDriverWait(self.browser, 20).until(lambda _: condition())


@pytest.fixture
def page(browser, tmp_path):
    made = Page(browser, tmp_path / "diff.html")
    yield made
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []  # neither errors nor violations of the policy


def name(diff, change, site, side="after"):
    """The name of the node of a site that changed in some way."""
    for row in diff.graphs[0].rows:
        if row.change.value == change and row.after and row.after.site == site:
            return getattr(row, side).name
    raise AssertionError((change, site))


def test_it_shows_the_model_its_changes_and_its_sites(page):
    page.open(decoder())
    assert page.one("h1").text == "Decoder capture → expand"
    counts = {
        button.get_attribute("data-change"): int("".join(filter(str.isdigit, button.text)))
        for button in page.all("#legend button")
    }
    assert counts == decoder().to_dict()["changes"]
    sites = [button.get_attribute("data-site") for button in page.all("#sites .site")]
    assert sites == [site.path for chain in decoder().graphs[0].chains for site in chain.sites]
    assert len(page.all("#sites .rejection")) == len(decoder().graphs[0].rejections)
    assert page.js("getComputedStyle(document.querySelector('#rows')).getPropertyValue('--n')") == "4"


def test_a_site_selects_its_row_on_both_sides_and_its_operands(page):
    page.open(decoder())
    assert page.selected == []
    page.one(f'[data-site="{FIRST}"]').click()
    update, add = name(decoder(), "replaced", FIRST), name(decoder(), "replaced", FIRST, "before")
    (left, before), (right, after) = page.selected
    assert (left, right) == ("before", "after")
    assert before.startswith(f"{add} = ")
    assert after.startswith(f"{update} = ")
    assert page.seen(".row:has([aria-selected=true])")
    assert page.js("decodeURIComponent(location.hash)") == f"#g0:after:{update}"
    details = page.one("#details").text
    for text in ("mhc.update", FIRST, "Block", "builders.py:", "float32[2, 5, 4, 8]", "read by"):
        assert text in details
    row = next(row for row in decoder().graphs[0].rows if row.after and row.after.name == update)
    marked = page.js("[...document.querySelectorAll('.cell.operand[data-side=after] b')].map(b => b.textContent)")
    assert set(marked) <= set(row.after.reads)
    assert {"mhc_post", "mhc_res"} <= set(marked)
    assert len(page.all(".arcs.after path.operand")) >= len(marked)
    assert page.all(".cell.user[data-side=before]")


def test_operands_in_the_details_lead_on(page):
    page.open(decoder(), f"#g0:after:{name(decoder(), 'replaced', FIRST)}")
    page.one('#details [data-name="mhc_post"]').click()
    assert [text.partition(" = ")[0] for _, text in page.selected] == ["mhc_post"]


def test_a_link_opens_at_its_node_and_unfolds_it(page):
    page.open(decoder())
    before = page.rows
    hidden = next(
        row.after for row in decoder().graphs[0].rows if row.after and row.after.module.startswith("blocks.1.attn")
    )
    page.open(decoder(), f"#g0:before:{hidden.name}")
    assert [text.partition(" = ")[0] for _, text in page.selected] == [hidden.name] * 2
    assert page.seen(".row:has([aria-selected=true])")
    assert page.rows > before


def test_headings_fold_and_unfold(page):
    page.open(decoder())

    def shown():
        return page.js("[...document.querySelectorAll('.row')].filter(row => row.offsetParent).length")

    start = shown()
    like = next(head for head in page.all(".depth1 > .head button") if "as blocks.0" in head.text)
    assert like.get_attribute("aria-expanded") == "false"
    like.click()
    assert like.get_attribute("aria-expanded") == "true"
    assert shown() > start
    like.click()
    assert shown() == start
    page.press("e")
    assert shown() == len(decoder().graphs[0].rows)
    page.press("e")
    assert shown() == start


def test_search_finds_a_site_counts_and_steps(page):
    page.open(decoder())
    page.press("/")
    assert page.browser.switch_to.active_element.get_attribute("id") == "query"
    page.press(FIRST)
    path = decoder().graphs[0]
    expected = sum(any(FIRST in f"{node.site} {node}" for node in (row.before, row.after) if node) for row in path.rows)
    assert page.one("#hits").text == f"1 of {expected}"
    assert page.seen(".row:has([aria-selected=true])")
    first = page.selected
    page.press(Keys.ENTER)
    assert page.one("#hits").text == f"2 of {expected}"
    assert page.selected != first
    page.press(Keys.SHIFT, Keys.ENTER)
    assert page.selected == first
    assert len(page.all(".row.hit")) > 1
    assert "hit" in page.one(f'li:has(> [data-site="{FIRST}"])').get_attribute("class")
    page.press(Keys.ESCAPE)
    assert page.selected == []
    assert page.one("#hits").text == ""
    page.press("/", "no such thing")
    assert page.one("#hits").text == "no hit"
    page.press(Keys.ESCAPE)


def test_keys_move_between_rows_changes_and_sides(page):
    page.open(decoder())
    page.press("n")
    first = page.selected
    page.press("n")
    assert page.selected != first
    page.press("p")
    assert page.selected == first
    page.open(decoder(), f"#g0:after:{name(decoder(), 'replaced', FIRST)}")
    start = page.selected
    page.press("j")
    below = page.selected
    assert below != start
    page.press("k")
    assert page.selected == start
    page.press(Keys.ARROW_DOWN)
    assert page.selected == below
    page.press(Keys.ARROW_UP, "h")
    assert ":before:" in page.js("location.hash")
    page.press(Keys.ARROW_RIGHT)
    assert ":after:" in page.js("location.hash")
    active = page.one("#rows").get_attribute("aria-activedescendant")
    assert page.one(f"#{active}").get_attribute("aria-selected") == "true"


def test_a_kind_of_change_can_be_hidden(page):
    page.open(decoder())
    rewired = page.all(".row[data-change=rewired]")
    assert all(row.is_displayed() for row in rewired)
    assert rewired
    page.one("#legend [data-change=rewired]").click()
    assert not any(row.is_displayed() for row in rewired)
    assert page.one("#legend [data-change=rewired]").get_attribute("aria-pressed") == "false"


def test_rejected_addition_shows_its_reason(page):
    page.open(hostile())
    page.all("#sites .rejection")[0].click()
    assert page.selected
    assert "skipped" in page.one("#details").text


def test_names_that_are_markup_are_text(page):
    page.open(hostile(), f"#g0:after:{quote(COMMENT)}")
    page.press("e")
    for button in page.all("#sites button"):
        button.click()
    page.press("/", "onerror")
    assert page.one("#hits").text.startswith("1 of ")
    assert page.js("window.hacked === undefined && document.images.length === 0 && document.scripts.length === 2")
    assert "onerror" in page.one("#sites").text


def test_the_graph_can_be_chosen(page):
    page.open(pieces(), "#g1:after:mhc_read_out")
    assert page.one("#graph").get_attribute("value") == "1"
    assert [text.partition(" = ")[0] for _, text in page.selected] == ["mhc_read_out"]
    page.one("#graph option[value='0']").click()
    assert len(page.all("#sites .site")) == 4


def test_a_model_in_which_nothing_changes(page):
    page.open(unchanged())
    assert "No chain" in page.one("#sites").text
    page.press("n", "j")
    assert len(page.selected) == 2


def test_a_model_without_a_graph(page):
    page.open(graphless())
    page.press("n", "j", "e", Keys.ESCAPE)
    page.one("#query").send_keys("x", Keys.ENTER)
    assert "no graph" in page.one("#details").text


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (900, 700)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_is_legible(page, width, height, scheme):
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.open(decoder(), f"#g0:after:{name(decoder(), 'replaced', FIRST)}")
    assert page.js("document.documentElement.scrollWidth") == width
    assert page.seen(".row:has([aria-selected=true])")
    assert json.loads(page.js(_CONTRASTS)) == {}


#: Texts whose contrast with what lies behind them is below the 4.5 of WCAG AA, by selector. All
#: colours here are opaque or fully transparent.
_CONTRASTS = r"""(() => {
  const rgb = text => text.match(/[\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = {};
  const texts = 'h1, h2, h3, small, i, b, dt, dd, footer, .sign, .text, .value, .note, .tag, .sentence, #options';
  for (const e of document.querySelectorAll(texts)) {
    if (!e.textContent.trim()) continue;
    const [a, b] = [luminance(rgb(getComputedStyle(e).color)), luminance(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found[e.tagName + '.' + e.className] = [ratio, e.textContent.slice(0, 30)];
  }
  return JSON.stringify(found);
})()"""


#: Calls its last argument with the milliseconds from a key press until its frame is painted.
PRESS = """
const [key, done] = arguments;
const started = performance.now();
document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
requestAnimationFrame(() => {
  const channel = new MessageChannel(); // its message comes after the frame is painted
  channel.port1.onmessage = () => done(performance.now() - started);
  channel.port2.postMessage(null);
});
"""


def test_a_large_graph(page, record_property, capsys):
    """Print how long a selection takes until its frame is painted."""
    large = decoder(24)
    assert len(large.graphs[0].rows) > 1000
    page.open(large)
    page.press("e")
    assert page.rows == len(large.graphs[0].rows)
    times = [page.browser.execute_async_script(PRESS, key) for key in "nnnnnjjjjjppk"]
    assert page.seen(".row:has([aria-selected=true])")
    page.one('[data-site="blocks.20.mhc.mlp"]').click()
    assert page.seen(".row:has([aria-selected=true])")
    page.press("/", "blocks.11.attn")
    assert page.one("#hits").text.startswith("1 of ")
    record_property("rows", page.rows)
    record_property("slowest_selection_ms", round(max(times), 1))
    with capsys.disabled():
        print(
            f"\n{page.rows} rows: a selection takes {sorted(times)[len(times) // 2]:.0f} ms, the slowest {max(times):.0f} ms"
        )
