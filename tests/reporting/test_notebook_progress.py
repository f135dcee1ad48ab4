"""Progress in a notebook is the picture of a terminal, drawn anew in the same output."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from rich.console import Console

from distprune.engine.telemetry.progress import Assignment, Progress, WorkerName
from distprune.reporting import chosen_progress, notebook_progress
from distprune.reporting.live_progress import PlainProgress
from distprune.reporting.notebook_progress import NotebookProgress


class Output:
    """Stands in for a cell's output, which is drawn again and again."""

    def __init__(self):
        self.drawn: list[str] = []

    def display(self, bundle, raw, display_id):
        assert raw and display_id
        self.update(bundle, raw)
        return self

    def update(self, bundle, raw):
        assert bundle["text/html"].startswith("<pre")
        self.drawn.append(bundle["text/plain"])


@pytest.fixture
def output(monkeypatch) -> Output:
    output, module = Output(), ModuleType("IPython.display")
    module.display = output.display
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return output


def test_bars_workers_and_notes_are_drawn_a_few_times_a_second_and_bars_and_notes_stay(output):
    now, worker = [0.0], WorkerName(0, "node-a")
    with NotebookProgress(lambda: now[0]) as progress:
        progress.stage("Dense pass", 100)
        progress.note("Forward passes are in <float32>")
        progress.joined(worker)
        now[0] = 1.0
        progress.began(worker, Assignment("prune", 3))
        assert "node-a/0" in output.drawn[-1] and "prune, layer 3" in output.drawn[-1]
        before = len(output.drawn)
        for _ in range(100):
            progress.advance()
        assert len(output.drawn) == before
    assert "Dense pass" in output.drawn[-1] and "100/100" in output.drawn[-1]
    assert "<float32>" in output.drawn[-1] and "node-a" not in output.drawn[-1]


def test_notebooks_show_progress_unless_told_otherwise_and_scripts_if_told(output, monkeypatch):
    assert type(chosen_progress(None)) is type(chosen_progress(False)) is Progress
    told = Progress()
    assert chosen_progress(told) is told
    (shown,) = chosen_progress(True)._parts
    assert type(shown) is PlainProgress
    monkeypatch.setattr(notebook_progress, "Console", lambda **how: Console(**{"force_jupyter": True} | how))
    for wanted in (None, True):
        (shown,) = chosen_progress(wanted)._parts
        assert type(shown) is NotebookProgress
    assert type(chosen_progress(False)) is Progress
