"""Python of the documentation runs, and YAML is what the program takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from markdown_pages import PAGES, ROOT, Block, Page, blocks_in

import distprune
from distprune.config import PruneConfig, load_config
from distprune.engine import RunRecord
from distprune.evaluation import ModelEvaluation
from distprune.families.tables import TABLES
from distprune.pipeline import load_pipeline

#: Of the page on methods, which test_plugin.py installs and runs.
PLUGIN = "adding-a-method.md"
#: Stand in for the scores of tasks, whose questions are not on this machine.
SCORES = {"hellaswag": {"acc_norm": 0.5}}


def python_of(page: Page) -> list[Block]:
    return [block for block in page.blocks if block.language == "python"]


def evaluate_without_tasks(*arguments, tasks=(), **options) -> list[ModelEvaluation]:
    """What `distprune.evaluate` finds of anything but tasks, with :data:`SCORES` of these."""
    found = EVALUATE(*arguments, **options)
    return [replace(each, tasks={task: SCORES[task] for task in tasks}) for each in found]


def prune_here(*names, **options) -> RunRecord:
    """What `distprune.prune` does, in this process and over what is there."""
    here = {"overwrite": True, "device": "cpu", "workers": 1, "push_to_hub": None}
    if names and isinstance(names[0], PruneConfig):
        return PRUNE(names[0].model_copy(update=here), **options)
    return PRUNE(*names, **options | here)


EVALUATE, PRUNE = distprune.evaluate, distprune.prune


def run(blocks: Iterable[Block]) -> dict:
    """The names that blocks of one page define, each block going on with those of the blocks before it."""
    names = {"__name__": "shown"}
    for block in blocks:
        exec(compile(block.text, str(block), "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page) and page.path.name != PLUGIN], ids=str)
def test_python_runs(page, here, monkeypatch):
    monkeypatch.setattr(distprune, "evaluate", evaluate_without_tasks)
    monkeypatch.setattr(distprune, "prune", prune_here)
    run(python_of(page))


def test_the_rows_that_the_page_on_families_shows_are_those_of_the_table():
    shown = run(python_of(Page(ROOT / "docs" / "families.md")))["TABLES"]
    assert shown
    assert {name: TABLES[name] for name in shown} == shown


@pytest.mark.parametrize("block", blocks_in("yaml"), ids=str)
def test_yaml_is_a_configuration(block, tmp_path):
    file = tmp_path / "shown.yaml"
    file.write_text(block.text)
    if "sparsities:" in block.text:
        assert load_pipeline(file).gate.perplexity.at_most_times_dense == 1.3
    else:
        assert load_config(file, {}).sparsity == 0.3
