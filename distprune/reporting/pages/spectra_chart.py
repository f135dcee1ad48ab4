"""The curves that a plan was made from, and where each layer was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from plotly.subplots import make_subplots

from distprune.engine.run.record import LayerRecord, RunRecord
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape
from distprune.methods import CostCurve
from distprune.reporting.pages.colours import by_depth
from distprune.reporting.pages.rendering import MARGIN, Chart

#: What the page calls the fields that a method's cost curves are about, by the kind of part that has them.
FIELDS: dict[tuple[str, type], str] = {
    ("attention.kv_heads", AttentionShape): "KV groups",
    ("attention.value_dim", AttentionShape): "width of a value head",
    ("attention.query_key_dim", AttentionShape): "width of a query/key head",
    ("attention.query_rank", AttentionShape): "rank of the query projection",
    ("attention.key_rank", AttentionShape): "rank of the key projection",
    ("attention.output_rank", AttentionShape): "rank of the output projection",
    ("ffn.width", FeedForwardShape): "neurons of the feed-forward network",
    ("ffn.count", ExpertsShape): "experts",
    ("ffn.width", ExpertsShape): "neurons of each expert",
    ("ffn.shared_width", ExpertsShape): "neurons of the shared expert",
}
#: Where a cut is marked of a part that went whole.
OF_WHOLE_PARTS = ("attention.kv_heads", "ffn.count", "ffn.width")
COLUMNS = 3
PANEL_HEIGHT, BETWEEN = 250, 70  # pixels


@dataclass(frozen=True)
class Line:
    """One layer's curve, in the layer's colour."""

    layer: LayerRecord
    colour: str
    curve: CostCurve


@dataclass(frozen=True)
class Cut:
    """How much one layer has kept of something, and what that is predicted to cost."""

    layer: int
    colour: str
    kept: int
    cost: float


def spectra_chart(record: RunRecord) -> Chart | None:
    """A panel for each thing that was cut in some layer; None where nothing was cut that the record has curves of."""
    drawn = {title: lines_of(record.layers, field, kind) for (field, kind), title in FIELDS.items()}
    cuts = {title: cuts_of(drawn[title], field) for (field, _), title in FIELDS.items()}
    panels = [title for title in drawn if cuts[title]]
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    rows = ceil(len(panels) / columns)
    height = PANEL_HEIGHT * rows
    spacing = {"vertical_spacing": BETWEEN / height, "horizontal_spacing": 0.06}
    figure = make_subplots(rows=rows, cols=columns, **spacing)
    figure.update_layout(template="none", height=height, margin=MARGIN | {"l": 58, "b": 44}, showlegend=False)
    for number, title in enumerate(panels):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for line in drawn[title]:
            figure.add_scatter(**drawn_line(line), **place)
        figure.add_scatter(**markers_of(cuts[title]), **place)
        figure.update_xaxes(title_text=title, **place)
    figure.update_xaxes(automargin=False, title_standoff=4, rangemode="tozero")
    figure.update_yaxes(automargin=False, type="log", tickformat="~g", nticks=6)
    sentence = (
        "What it is predicted to cost, in nats a token, to keep only so much of one thing in one layer: a line for "
        "each layer, from the first (green) to the last (orange). Dots are where layers were cut. Of a rank, each step "
        "is the square of a singular value, in the metric of the loss."
    )
    return Chart("spectra", "Spectra and cuts", sentence, figure)


def lines_of(layers: Sequence[LayerRecord], field: str, kind: type) -> list[Line]:
    """The curves of the layers whose part is of that kind."""
    part = field.partition(".")[0]
    return [
        Line(layer, colour, layer.cost_curves[field])
        for layer, colour in zip(layers, by_depth(len(layers)), strict=True)
        if field in layer.cost_curves and isinstance(getattr(layer.dense, part), kind)
    ]


def drawn_line(line: Line) -> dict[str, Any]:
    """What costs nothing has no place on a logarithmic axis."""
    return {
        "x": line.curve.kept,
        "y": [cost if cost > 0 else None for cost in line.curve.costs],
        "mode": "lines",
        "line": {"color": line.colour, "width": 1.2},
        "hovertemplate": f"layer {line.layer.index}: " + "%{y:.3g} nats with %{x} left<extra></extra>",
    }


def markers_of(cuts: Sequence[Cut]) -> dict[str, Any]:
    return {
        "x": [cut.kept for cut in cuts],
        "y": [cut.cost for cut in cuts],
        "mode": "markers",
        "marker": {"color": [cut.colour for cut in cuts], "size": 8, "line": {"width": 1, "color": "white"}},
        "text": [f"layer {cut.layer}" for cut in cuts],
        "hovertemplate": "%{text}: cut to %{x}, %{y:.3g} nats<extra></extra>",
    }


def cuts_of(lines: Sequence[Line], field: str) -> list[Cut]:
    """Those of the layers that were cut."""
    kept = [(line, kept_of(line.layer, field)) for line in lines]
    return [
        Cut(line.layer.index, line.colour, left, float(np.interp(left, line.curve.kept, line.curve.costs)))
        for line, left in kept
        if left is not None
    ]


def kept_of(layer: LayerRecord, field: str) -> int | None:
    """How much a layer has kept; None where that is all of it."""
    part, _, name = field.partition(".")
    dense, pruned = getattr(layer.dense, part), getattr(layer.pruned, part)
    if pruned is None:
        return 0 if field in OF_WHOLE_PARTS else None
    kept = getattr(pruned, name)
    return None if kept == getattr(dense, name) else kept
