"""The curves that a plan was made from, and where each layer was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from distprune.engine.run.record import LayerRecord, RunRecord
from distprune.reporting.pages.colours import by_depth
from distprune.reporting.pages.rendering import MARGIN, Chart

#: What the page calls the fields that a method's cost curves are about.
FIELDS = {
    "attention.kv_heads": "KV groups",
    "attention.value_dim": "width of a value head",
    "attention.query_key_dim": "width of a query/key head",
    "attention.query_rank": "rank of the query projection",
    "attention.key_rank": "rank of the key projection",
    "attention.output_rank": "rank of the output projection",
    "ffn.count": "experts",
    "ffn.width": "neurons",
    "ffn.shared_width": "neurons of the shared expert",
}
#: Where a cut is marked of a part that went whole.
OF_WHOLE_PARTS = ("attention.kv_heads", "ffn.count", "ffn.width")
COLUMNS = 3
PANEL_HEIGHT, BETWEEN = 250, 70  # pixels


@dataclass(frozen=True)
class Cut:
    """How much one layer has kept of something, and what that is predicted to cost."""

    layer: int
    colour: str
    kept: int
    cost: float


def spectra_chart(record: RunRecord) -> Chart | None:
    """A panel for each thing that was cut in some layer; None where nothing was cut that the record has curves of."""
    panels = {field: cuts for field in FIELDS if (cuts := cuts_of(record.layers, field))}
    if not panels:
        return None
    rows = ceil(len(panels) / COLUMNS)
    height = PANEL_HEIGHT * rows
    spacing = {"vertical_spacing": BETWEEN / height, "horizontal_spacing": 0.06}
    figure = make_subplots(rows=rows, cols=COLUMNS, **spacing)
    figure.update_layout(template="none", height=height, margin=MARGIN | {"l": 44, "b": 44}, showlegend=False)
    for number, (field, cuts) in enumerate(panels.items()):
        add_panel(figure, record.layers, field, cuts, {"row": number // COLUMNS + 1, "col": number % COLUMNS + 1})
    figure.update_xaxes(automargin=False, title_standoff=4, rangemode="tozero")
    figure.update_yaxes(automargin=False, type="log", tickformat="~g", nticks=6)
    sentence = (
        "What it is predicted to cost, in nats a token, to keep only so much of one thing in one layer: a line for "
        "each layer, from the first (green) to the last (orange). Dots are where layers were cut. Of a rank, each step "
        "is the square of a singular value, in the metric of the loss."
    )
    return Chart("spectra", "Spectra and cuts", sentence, figure)


def add_panel(
    figure: go.Figure, layers: Sequence[LayerRecord], field: str, cuts: Sequence[Cut], place: dict[str, int]
) -> None:
    for layer, colour in zip(layers, by_depth(len(layers)), strict=True):
        if field in layer.cost_curves:
            figure.add_scatter(**line_of(layer, field), line={"color": colour, "width": 1.2}, **place)
    figure.add_scatter(**markers_of(cuts), **place)
    figure.update_xaxes(title_text=FIELDS[field], **place)


def line_of(layer: LayerRecord, field: str) -> dict[str, Any]:
    """What costs nothing has no place on a logarithmic axis."""
    curve = layer.cost_curves[field]
    return {
        "x": curve.kept,
        "y": [cost if cost > 0 else None for cost in curve.costs],
        "mode": "lines",
        "hovertemplate": f"layer {layer.index}: " + "%{y:.3g} nats with %{x} left<extra></extra>",
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


def cuts_of(layers: Sequence[LayerRecord], field: str) -> list[Cut]:
    """Those of all layers that have a curve."""
    cuts = []
    for layer, colour in zip(layers, by_depth(len(layers)), strict=True):
        kept = kept_of(layer, field) if field in layer.cost_curves else None
        if kept is not None:
            curve = layer.cost_curves[field]
            cuts.append(Cut(layer.index, colour, kept, float(np.interp(kept, curve.kept, curve.costs))))
    return cuts


def kept_of(layer: LayerRecord, field: str) -> int | None:
    """How much a layer has kept; None where that is all of it."""
    part, _, name = field.partition(".")
    dense, pruned = getattr(layer.dense, part), getattr(layer.pruned, part)
    if pruned is None:
        return 0 if field in OF_WHOLE_PARTS else None
    kept = getattr(pruned, name)
    return None if kept == getattr(dense, name) else kept
