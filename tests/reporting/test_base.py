"""Results are data; a registered renderer prints them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from rich.text import Text

from mhc_compile.reporting.base import Renderable, render


@dataclass(frozen=True)
class Count(Renderable):
    number: int


@dataclass(frozen=True)
class LargeCount(Count):
    pass


@dataclass(frozen=True)
class Unregistered(Renderable):
    pass


@render.register(Count)
def render_count(count: Count, *, unit: str = "sites") -> Text:
    return Text(f"{count.number} {unit} <&>")


def test_the_registered_renderer_serves_consoles_and_notebooks_and_subclasses():
    assert str(render(Count(3), unit="adds")) == "3 adds <&>"
    assert str(LargeCount(4).__rich__()) == "4 sites <&>"
    html = Count(3)._repr_html_()
    assert html.startswith("<pre")
    assert "3 sites &lt;&amp;&gt;" in html


def test_a_class_without_a_renderer_is_an_error_that_names_it():
    with pytest.raises(
        TypeError,
        match=r"no renderer is registered for .*Unregistered; expected a function decorated with render\.register",
    ):
        render(Unregistered())
