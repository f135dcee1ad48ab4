"""What the pages call an extra of the package is one."""

from __future__ import annotations

import re

import pytest
from markdown_pages import PAGES, ROOT

NAMED = re.compile(r"\bextras?\s+`([\w-]+)`(?:\s+and\s+`([\w-]+)`)?")


def extras() -> set[str]:
    _, section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")
    section, *_ = section.split("\n[")
    return set(re.findall(r"^([\w-]+) = ", section, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_extras_that_are_named_exist(page):
    assert not {name for found in NAMED.findall(page.prose) for name in found if name} - extras()


def test_the_readme_lists_extras():
    _, table = (ROOT / "README.md").read_text().split("\n| extra | adds |\n")
    rows, *_ = table.split("\n\n")
    listed = {name for row in rows.splitlines() for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert listed == extras() - {"test"}
