"""The report of a comparison: every method and sparsity by size and quality."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from typing import Any

from distprune.comparison import ComparisonRow
from distprune.reporting.pages.rendering import ABOVE, Chart, HtmlTable, plain_figure, render
from distprune.reporting.pages.wording import percent
from distprune.reporting.run_tables import comparison_columns, comparison_row

DENSE = "dense"
#: From so many times the least perplexity on, the axis is logarithmic.
WIDE = 5
#: A ring around each result that none beats in both size and quality.
RING = {"symbol": "circle-open", "size": 17, "color": "#94a3b8", "line": {"width": 2}}


def comparison_page(rows: Sequence[ComparisonRow]) -> str:
    """The HTML of the report."""
    columns = [column.strip().replace("\n", " ") for column in comparison_columns(rows)]
    methods = sorted({row.method for row in rows} - {DENSE})
    return render(
        "comparison.html.jinja",
        title=f"Comparison: {', '.join(methods) or DENSE}",
        subtitle="Pruned with each method at each sparsity on one calibration set, evaluated on one text.",
        chart=pareto_chart(rows),
        table=HtmlTable(columns, [comparison_row(row)[: len(columns)] for row in rows]),
    )


def pareto_chart(rows: Sequence[ComparisonRow]) -> Chart:
    """Perplexity by parameters, a line for each method, rings around the results that none beats in both."""
    figure = plain_figure(480, legend=ABOVE)
    for method in dict.fromkeys(row.method for row in rows):
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.total_parameters)
        figure.add_scatter(
            name=method,
            x=[row.total_parameters for row in own],
            y=[row.perplexity if isfinite(row.perplexity) else None for row in own],
            mode="lines+markers",
            marker={"size": 9, "symbol": "star" if method == DENSE else "circle"},
            customdata=[f"{percent(row.sparsity_reached)} removed, {row.total_parameters:,} parameters" for row in own],
            hovertemplate=method + "<br>perplexity %{y:.2f}<br>%{customdata}<extra></extra>",
        )
    best = pareto_front(rows)
    figure.add_scatter(
        name="beaten by none in both",
        x=[row.total_parameters for row in best],
        y=[row.perplexity for row in best],
        mode="markers",
        marker=RING,
        hoverinfo="skip",
    )
    figure.update_xaxes(title_text="parameters", tickformat=".3s")
    figure.update_yaxes(**perplexity_axis([row.perplexity for row in rows if isfinite(row.perplexity)]))
    sentence = (
        "Down and to the left is better. A ring is around each result that no other beats in both parameters and "
        "perplexity."
    )
    return Chart("pareto", "Perplexity by parameters", sentence, figure)


def perplexity_axis(values: Sequence[float]) -> dict[str, Any]:
    """Logarithmic where a bad result would leave the good ones no room."""
    if max(values, default=1.0) < WIDE * min(values, default=1.0):
        return {"title_text": "perplexity"}
    return {"title_text": "perplexity (logarithmic)", "type": "log", "tickformat": "~g", "nticks": 8}


def pareto_front(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The results that no other beats in both parameters and perplexity, from the smallest on."""
    best, front = inf, []
    for row in sorted(rows, key=lambda row: (row.total_parameters, row.perplexity)):
        if row.perplexity < best:
            best, front = row.perplexity, [*front, row]
    return front
