"""What a report says, out of its HTML."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

#: Elements that have no end tag.
VOID = {"meta", "br", "link", "img", "input", "hr"}


@dataclass
class Page:
    """Texts and values by the id of the innermost element that has one; charts by their section's.

    ``urls`` are all that an attribute names to be loaded, and ``policy`` is the page's content security policy.
    """

    texts: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[list[str]] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    policy: str = ""

    def heat_map(self, chart: str) -> dict[str, list[Any]]:
        """The shares in a heat map, by row."""
        [trace] = self.charts[chart]["data"]
        return dict(zip(trace["y"], trace["z"], strict=True))

    def trace(self, chart: str, name: str | None = None) -> dict[str, Any]:
        return next(trace for trace in self.charts[chart]["data"] if name is None or trace.get("name") == name)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.page, self.open = Page(), []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.page.urls += [given[name] for name in ("src", "href", "srcset", "data", "action") if given.get(name)]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.page.policy = given["content"]
        if tag == "data":
            self.page.values[self._id()] = float(given["value"])
        if tag == "tr":
            self.page.rows.append([])
        if tag in ("td", "th"):
            self.page.rows[-1].append("")
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag, given = self.open[-1] if self.open else ("", {})
        if given.get("class") == "chart":
            self.page.charts[self._id()] = json.loads(data)
        elif tag not in ("script", "style"):
            self.page.texts[self._id()] = self.page.texts.get(self._id(), "") + data
            if tag in ("td", "th"):
                self.page.rows[-1][-1] += data

    def _id(self) -> str:
        return next((given["id"] for _, given in reversed(self.open) if "id" in given), "")


def read_page(html: str | Path) -> Page:
    reader = _Reader()
    reader.feed(html.read_text(encoding="utf-8") if isinstance(html, Path) else html)
    reader.close()
    return reader.page
