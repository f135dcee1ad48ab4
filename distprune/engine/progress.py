"""What a run tells while it goes: one progress bar a stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBar


class Progress(AbstractContextManager):
    """The silent one; the others say what happens."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A stage of ``total`` steps begins, of which an earlier run has ``done`` some; the one before has ended."""

    def advance(self) -> None:
        """One step of the stage is done."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def __exit__(self, *error) -> None:
        pass


class TerminalProgress(Progress):
    def __init__(self, console: Console):
        self._bar = RichBar(
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._stage = None

    def __enter__(self):
        self._bar.start()
        return self

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._stage = self._bar.add_task(name, total=total, completed=done)

    def advance(self) -> None:
        self._bar.advance(self._stage)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def __exit__(self, *error) -> None:
        self._bar.stop()


class PlainProgress(Progress):
    """A line at the start of a stage and about every quarter of it."""

    def __init__(self, console: Console):
        self._console = console
        self._name, self._done, self._total = "", 0, 0

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._name, self._done, self._total = name, done, total
        self.note(f"{name} ..." + (f" ({done} of {total} done before)" if done else ""))

    def advance(self) -> None:
        self._done += 1
        quarter = max(1, self._total // 4)
        if self._done % quarter == 0 or self._done == self._total:
            self.note(f"{self._name}: {self._done}/{self._total}")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def console_progress(console: Console) -> Progress:
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)
