"""Progress is a bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from distprune.engine.progress import PlainProgress, Progress, TerminalProgress, console_progress


def go_through(progress: Progress) -> None:
    with progress:
        progress.stage("Dense pass", 8)
        for _ in range(8):
            progress.advance()
        progress.note("took [long] enough")
        progress.stage("Pruning", 2)
        progress.advance()
        progress.advance()


def test_away_from_a_terminal_there_are_a_few_plain_lines():
    file = io.StringIO()
    progress = console_progress(Console(file=file, width=20))
    assert type(progress) is PlainProgress
    go_through(progress)
    assert file.getvalue().splitlines() == [
        "Dense pass ...",
        "Dense pass: 2/8",
        "Dense pass: 4/8",
        "Dense pass: 6/8",
        "Dense pass: 8/8",
        "took [long] enough",
        "Pruning ...",
        "Pruning: 1/2",
        "Pruning: 2/2",
    ]


def test_on_a_terminal_there_is_a_bar_a_stage():
    file = io.StringIO()
    progress = console_progress(Console(file=file, force_terminal=True, width=100))
    assert type(progress) is TerminalProgress
    go_through(progress)
    for text in ("Dense pass", "8/8", "took [long] enough", "Pruning", "2/2"):
        assert text in file.getvalue()


def test_a_bar_stops_when_the_run_fails():
    progress = console_progress(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(KeyboardInterrupt), progress:
        progress.stage("Pruning", 2)
        raise KeyboardInterrupt
    assert not progress._bar.live.is_started


def test_the_silent_progress_says_nothing(capsys):
    go_through(Progress())
    assert capsys.readouterr() == ("", "")
