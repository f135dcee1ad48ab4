"""Evaluations on a terminal: a long name leaves every number its room."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from distprune.evaluation import BatchSpeed
from distprune.reporting.evaluation_tables import speed_table


def test_a_long_name_leaves_numbers_their_room():
    speeds = [BatchSpeed(1, 1151.0, 31.0, 1.0, 1.0), BatchSpeed(1, 1826.0, 41.0, 1.62, 1.34)]
    names = ["/somewhere/" + 12 * "deep/" + "model", "pruned"]
    text = StringIO()
    Console(file=text, width=80).print(speed_table(names, speeds, 1))
    shown = text.getvalue()
    assert all(number in shown for number in ("1,151 (1.00)", "31 (1.00)", "1,826 (1.62)", "41 (1.34)"))
    assert all(len(line) <= 80 for line in shown.splitlines())
