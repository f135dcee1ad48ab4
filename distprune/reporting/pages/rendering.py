"""Content and charts in one HTML file, that loads nothing from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from distprune.reporting.pages.colours import TEMPLATES
from distprune.version import __version__

MARGIN = {"l": 10, "r": 10, "t": 10, "b": 10}
#: Where a legend stands.
ABOVE = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}


@dataclass(frozen=True)
class Chart:
    """A figure, with what it shows in one sentence or two.

    Attributes:
        name: that of its element in the page.
        title: over it.
        sentence: under the title.
        figure: its data and layout, without colours of text and background, which are the page's.
    """

    name: str
    title: str
    sentence: str
    figure: go.Figure

    def to_json(self) -> dict[str, Any]:
        return self.figure.to_plotly_json()


@dataclass(frozen=True)
class Figure:
    """One number that the page shows large: in words, what it is of, exactly, and what is said under it."""

    name: str
    title: str
    text: str
    value: float | int | None = None
    below: str = ""


@dataclass(frozen=True)
class HtmlTable:
    """A table: the first column is text, the others are numbers."""

    columns: list[str]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """A part of the page: tables, charts, and a table that is unfolded by a click on its ``summary``."""

    name: str
    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[HtmlTable] = ()
    details: HtmlTable | None = None
    summary: str = ""


def plain_figure(height: int, **layout: Any) -> go.Figure:
    """A figure with nothing in it yet. Its template is set where it is drawn, by the page's colours."""
    return go.Figure(layout={"template": "none", "height": height, "margin": MARGIN, **layout})


def render(template: str, **content: Any) -> str:
    """The page that a template makes of the content."""
    return (
        environment()
        .get_template(template)
        .render(content, plotly=get_plotlyjs(), templates=TEMPLATES, version=__version__)
    )


@cache
def environment() -> Environment:
    loader = PackageLoader("distprune.reporting.pages")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
