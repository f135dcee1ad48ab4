"""The run's timeline: a row for each worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from distprune.reporting.pages.colours import WRONG
from distprune.reporting.pages.rendering import ABOVE, Chart, plain_figure
from distprune.reporting.pages.timeline import Span, Timeline
from distprune.reporting.pages.wording import duration, percent, three_digits

TALLEST_ROW, TALLEST, AROUND = 30, 900, 100  # pixels
LOST = "lost or given up"
LOST_MARKER = {"color": WRONG, "pattern": {"shape": "/"}}
#: Seconds, and how many of them a unit of the axis has, by the largest that it is for.
UNITS = {180: (1, "seconds"), 3 * 3600: (60, "minutes"), float("inf"): (3600, "hours")}


def timeline_chart(timeline: Timeline) -> Chart | None:
    """What each worker did when; None where the log tells of no call."""
    if not timeline.spans:
        return None
    size, unit = next(found for most, found in UNITS.items() if timeline.end <= most)
    workers = timeline.workers
    row = max(6, min(TALLEST_ROW, TALLEST // len(workers)))
    figure = plain_figure(AROUND + row * len(workers), barmode="overlay", bargap=0.2, legend=ABOVE)
    for stage in timeline.stages:
        add_bars(figure, stage, [span for span in timeline.spans if span.stage == stage and not span.lost], size)
    add_bars(figure, LOST, [span for span in timeline.spans if span.lost], size, LOST_MARKER)
    for time in timeline.resumed:
        figure.add_vline(time / size, line_dash="dot", line_width=1, annotation_text="resumed")
    figure.update_xaxes(title_text=f"{unit} since the first worker was up", range=[0, timeline.end / size])
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=workers[::-1],
        showgrid=False,
        ticklabelstandoff=6,
        showticklabels=row >= 12,
    )
    sentence = (
        f"What each worker did when. The first was up after {duration(timeline.waited)}; while workers were up, they "
        f"were busy for {percent(timeline.busy)} of the time."
    )
    if timeline.resumed:
        sentence += " The time between an interruption and the next attempt is left out."
    return Chart("timeline", "Timeline of the workers", sentence, figure)


def add_bars(
    figure: go.Figure, name: str, spans: Sequence[Span], size: int, marker: dict[str, Any] | None = None
) -> None:
    if spans:
        figure.add_bar(
            name=name,
            orientation="h",
            y=[span.worker for span in spans],
            base=[span.start / size for span in spans],
            x=[(span.end - span.start) / size for span in spans],
            marker={"line": {"width": 0}, **(marker or {})},
            customdata=[hover(span) for span in spans],
            hovertemplate="%{y}, " + name + "<br>%{customdata}<extra></extra>",
        )


def hover(span: Span) -> str:
    layers = "" if span.layers is None else said_layers(*span.layers)
    times = "" if span.count == 1 else f", {span.count} calls"
    return f"{', '.join(span.calls)}{layers}{times}<br>{three_digits(span.start)} s to {three_digits(span.end)} s"


def said_layers(first: int, last: int) -> str:
    return f", layer {first}" if first == last else f", layers {first} to {last}"
