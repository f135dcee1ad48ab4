"""Links lead somewhere, files that are named exist, and every page is listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_pages import PAGES, ROOT, Page

#: Pages that others are linked to before they are there. Empty this when they are.
TO_COME = {"docs/model-card.md", "docs/python.md", "docs/report.md"}
#: A path in the repository, in prose or code.
NAMED = re.compile(r"(?<![\w/.:@-])((?:scripts|tests|docs|cluster|distprune)/[\w./-]*\w)")


def is_there(path: Path) -> bool:
    return path.exists() or str(path.relative_to(ROOT)) in TO_COME


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    broken = []
    for link in page.links:
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        if not is_there(target) or (anchor and anchor not in Page(target).anchors):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_are_named_exist(page):
    assert not [name for name in NAMED.findall(page.text) if not is_there(ROOT / name)]


def test_the_index_lists_every_page():
    index = Page(ROOT / "docs" / "index.md")
    listed = {(index.path.parent / link.partition("#")[0]).resolve() for link in index.links}
    pages = {page.path for page in PAGES if page.path.is_relative_to(ROOT / "docs")} - {index.path}
    assert not sorted(map(str, pages - listed))
