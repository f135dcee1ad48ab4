"""The pages on methods say of options, layouts and targets what the methods are."""

from __future__ import annotations

import re

import pytest
import yaml
from markdown_pages import ROOT, Page

from distprune.config import DistillConfig
from distprune.methods.registry import BUILT_IN, METHODS

FOLDER = ROOT / "docs" / "methods"
#: What stands between cells, but not within them.
CELLS = re.compile(r"(?<!\\)\|")


def table(page: Page, heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading, by their first cell."""
    _, section = page.text.split(f"\n## {heading}\n")
    section, *_ = section.split("\n## ")
    rows = [CELLS.split(line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    return {first.strip("` "): [cell.strip() for cell in rest] for first, *rest in rows}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_page_lists_the_methods_options_and_their_defaults(name):
    rows = table(Page(FOLDER / f"{name}.md"), "Options")
    shown = {option: yaml.safe_load(default) for option, (default, _) in rows.items()}
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
    assert rows.keys() == DistillConfig.model_fields.keys()
    for objective, place in (("layers", 0), ("logits", -1)):
        defaults = DistillConfig(objective=objective).model_dump(exclude={"calibration"})
        for name, default in defaults.items() - {("objective", "logits")}:
            shown = rows[name][1].split("; logits: ")[place]
            assert yaml.safe_load(shown) == default, name
