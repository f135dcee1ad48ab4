"""The report of a comparison has a point for each row, and tells which rows none beats."""

from __future__ import annotations

from html_pages import read_page

from distprune.comparison import ComparisonRow
from distprune.reporting.pages.comparison_page import comparison_page, pareto_front

ROWS = [
    ComparisonRow("dense", 0.0, 0.0, 1_000, 2_000, 10.0),
    ComparisonRow("olica", 0.2, 0.21, 790, 1_790, 12.0, seconds=3.0),
    ComparisonRow("olica", 0.3, 0.3, 700, 1_700, 20.0, seconds=3.0),
    ComparisonRow("oops", 0.2, 0.2, 800, 1_800, 13.0, seconds=4.0),
    ComparisonRow("oops", 0.3, 0.3, 700, 1_700, 18.0, seconds=4.0),
]


def test_every_row_is_a_point_of_its_methods_line():
    page = read_page(comparison_page(ROWS))
    for method in ("dense", "olica", "oops"):
        points = page.trace("pareto", method)
        found = {*zip(points["x"], points["y"], strict=True)}
        assert found == {(row.total_parameters, row.perplexity) for row in ROWS if row.method == method}
    assert page.urls == []


def test_rows_that_none_beats_in_both_are_ringed():
    assert pareto_front(ROWS) == [ROWS[4], ROWS[1], ROWS[0]]
    rings = read_page(comparison_page(ROWS)).trace("pareto", "beaten by none in both")
    assert rings["x"] == [1_700, 1_790, 2_000]


def test_the_table_has_all_rows():
    head, *rows = read_page(comparison_page(ROWS)).rows
    counts = ["decoder parameters", "all parameters"]
    assert head == ["method", "asked", "reached", *counts, "perplexity", "seconds", "peak GiB"]
    assert rows[1] == ["olica", "20%", "21.00%", "790", "1,790", "12.00", "3.0", "-"]
    assert len(rows) == len(ROWS)


def test_a_perplexity_that_is_not_finite_is_no_point():
    page = read_page(comparison_page([*ROWS, ComparisonRow("magnitude", 0.9, 0.9, 100, 1_100, float("inf"))]))
    assert page.trace("pareto", "magnitude")["y"] == [None]
    assert 1_100 not in page.trace("pareto", "beaten by none in both")["x"]
