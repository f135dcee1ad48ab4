"""The pages on methods say of options, layouts and targets what the methods are."""

from __future__ import annotations

import re

import pytest
import yaml
from markdown_pages import ROOT, Page
from pydantic_core import PydanticUndefined

from distprune.config import DistillConfig
from distprune.methods.registry import BUILT_IN, METHODS

FOLDER = ROOT / "docs" / "methods"


def table(page: Page, heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading, by their first cell."""
    _, section = page.text.split(f"\n## {heading}\n")
    section, *_ = section.split("\n## ")
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `") or "--" in line]
    return {first.strip("` "): rest for first, *rest in rows}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_page_lists_the_methods_options_and_their_defaults(name):
    shown = {option: yaml.safe_load(cells[0]) for option, cells in table(Page(FOLDER / f"{name}.md"), "Options").items()
             if option in METHODS[name].model_fields}  # fmt: skip
    assert shown == {option: field.default for option, field in METHODS[name].model_fields.items()}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_page_says_what_the_method_needs(name):
    page, method = Page(FOLDER / f"{name}.md"), METHODS[name]
    _, needs = page.text.split("\n## What it needs\n")

    def cell(row: str) -> str:
        return re.search(rf"^\| {row} \| (.*) \|$", needs, re.MULTILINE)[1]

    assert tuple(re.findall(r"`([\w-]+)`", cell("`--layout`"))) == method.layouts
    assert tuple(re.findall(r"`([\w-]+)`", cell("`--target`"))) == method.targets
    assert cell("`--experts-at-once`").startswith("yes") == method.takes_chunks
    has_gradient_pass = method.gradient_moments is not METHODS["magnitude"].gradient_moments
    assert cell("gradient pass").startswith("yes") == has_gradient_pass


def test_the_page_on_distillation_lists_its_options():
    rows = table(Page(FOLDER / "distillation.md"), "Options")
    shown = {name: cells for name, cells in rows.items() if name in DistillConfig.model_fields}
    assert shown.keys() == DistillConfig.model_fields.keys()
    for name, (_, default, _) in shown.items():
        alone, _, _ = default.partition(";")
        field = DistillConfig.model_fields[name].default
        if field is not None and field is not PydanticUndefined:
            assert yaml.safe_load(alone) == field
