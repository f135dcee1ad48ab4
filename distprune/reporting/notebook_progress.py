"""Progress in a notebook: the picture that a terminal shows, as the output of the cell."""

from __future__ import annotations

import io
from collections.abc import Callable
from time import monotonic

from rich.console import Console, Group
from rich.jupyter import JUPYTER_HTML_FORMAT
from rich.text import Text

from distprune.engine.telemetry.harmless import Unfailing
from distprune.engine.telemetry.progress import Progress, WorkerName
from distprune.reporting.live_progress import DrawnProgress, console_progress

WIDTH = 110
# Seconds between two drawings, at least.
PAUSE = 0.25


class NotebookProgress(DrawnProgress):
    """The picture below a cell, drawn anew when something happens; what stays in the notebook is the last one.

    rich's own live display needs ipywidgets, and leaves nothing in a notebook that is opened without a kernel.
    """

    def __init__(self, now: Callable[[], float] = monotonic):
        super().__init__(Console(file=io.StringIO(), width=WIDTH, force_jupyter=False), now)
        self._notes: list[str] = []
        self._drawn = now()

    def __enter__(self):
        from IPython.display import display

        self._output = display(self._drawing(), raw=True, display_id=True)
        return self

    def stage(self, name: str, total: int, done: int = 0) -> None:
        super().stage(name, total, done)
        self._draw()

    def advance(self) -> None:
        super().advance()
        self._draw_soon()

    def note(self, text: str) -> None:
        self._notes.append(text)
        self._draw()

    def _does(self, worker: WorkerName, what: str) -> None:
        super()._does(worker, what)
        self._draw_soon()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._draw()

    def _draw_soon(self) -> None:
        if self._now() - self._drawn >= PAUSE:
            self._draw()

    def _draw(self) -> None:
        self._output.update(self._drawing(), raw=True)
        self._drawn = self._now()

    def _drawing(self) -> dict[str, str]:
        paper = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False)
        paper.print(Group(*map(Text, self._notes), self._picture()))
        text = paper.export_text(clear=False)
        return {"text/plain": text, "text/html": paper.export_html(inline_styles=True, code_format=JUPYTER_HTML_FORMAT)}


def chosen_progress(wanted: Progress | bool | None) -> Progress:
    """What shows progress to whoever calls from Python.

    Args:
        wanted: True for a display, in the notebook or on standard error; False for none; None for one in notebooks
            alone; or what shows it.
    """
    if isinstance(wanted, Progress):
        return wanted
    in_notebook = Console().is_jupyter
    if not (in_notebook if wanted is None else wanted):
        return Progress()
    if in_notebook:
        return Unfailing("the display", NotebookProgress)
    return Unfailing("the display", lambda: console_progress(Console(stderr=True, soft_wrap=True)))
