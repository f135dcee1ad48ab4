"""The table of families says what the code finds out."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_families import CARRIED, FAMILIES, MIXTURES, tiny_config

from distprune.layers.architecture import Architecture

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"
COLUMNS = ("heads", "values", "pairs", "factors", "neurons", "experts", "branch")
WHOLE = {"both": {"attention", "ffn"}, "attention": {"attention"}, "FFN": {"ffn"}}


def rows() -> dict[str, set[str]]:
    """``model_type`` -> what the table says may go."""
    _, page = PAGE.read_text().split("## What can be removed from which family\n")
    table, *_ = page.split("\n## ")
    found = {}
    for line in table.splitlines():
        if line.startswith("| ") and "`" in line and "model_type" not in line:
            _, _, model_type, *cells, whole, _ = (cell.strip() for cell in line.split("|"))
            goes = {name for name, cell in zip(COLUMNS, cells, strict=True) if cell == "yes"}
            found[model_type.strip("`")] = goes | WHOLE[whole]
    return found


def test_the_table_has_every_family_that_is_tested():
    assert rows().keys() == FAMILIES.keys() | MIXTURES.keys() | CARRIED.keys()


def test_pages_count_the_families_as_the_table_does():
    assert f"{len(rows())} are tested" in (ROOT / "README.md").read_text()
    assert f"[{len(FAMILIES)} tested]" in (ROOT / "docs" / "comparison.md").read_text()


@pytest.mark.parametrize("model_type", [*FAMILIES, *MIXTURES, *CARRIED])
def test_the_table_says_what_may_go(model_type):
    architecture = Architecture(tiny_config(model_type))
    removables = [vars(architecture.removable(index)) for index in range(architecture.num_layers)]
    assert rows()[model_type] == {name for each in removables for name, may_go in each.items() if may_go}
