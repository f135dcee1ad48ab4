"""What was taken from where: heat maps of layers and parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from distprune.engine.run.record import LayerRecord, RunRecord
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape
from distprune.reporting.pages.rendering import Chart, plain_figure
from distprune.reporting.pages.wording import percent

#: Of more layers, cells are too narrow for text.
MOST_WITH_TEXT = 32
#: Of so many, text is as large as elsewhere.
MOST_WITH_LARGE_TEXT = 16
ROW_HEIGHT, AROUND = 34, 90  # pixels
#: How the page calls the parts of the record.
PARTS = {
    "attention": "attention",
    "ffn": "feed-forward network",
    "experts": "experts",
    "shared expert": "shared expert",
    "router": "router",
}
WHOLE = "whole layer"


@dataclass(frozen=True)
class Cell:
    """The share that was removed, and what stands in the cell and in the window over it."""

    share: float
    text: str
    hover: str


#: One row of a heat map: a cell for each layer, None where the layer has no such thing.
Row = list[Cell | None]


def parameters_chart(record: RunRecord) -> Chart:
    """Layer by layer and part by part the share of the parameters that was removed."""
    rows = {PARTS[part]: [part_cell(layer, part) for layer in record.layers] for part in parts_of(record)}
    rows[WHOLE] = [parameters_cell(layer.parameters_before, layer.parameters_after) for layer in record.layers]
    sentence = (
        "Share of the parameters that was removed, by layer and part. Empty: the layer has no such part. Below zero: a "
        "linear branch was added that is larger than what went."
    )
    return Chart("parameters-removed", "Parameters removed", sentence, heat_map(rows, record.layers))


def parts_of(record: RunRecord) -> list[str]:
    """The parts that some layer has, in the order in which the page shows them; not the rest, of which nothing goes."""
    return [part for part in PARTS if any(part in layer.parts for layer in record.layers)]


def part_cell(layer: LayerRecord, part: str) -> Cell | None:
    return parameters_cell(*layer.parts[part]) if part in layer.parts else None


def parameters_cell(before: int, after: int) -> Cell:
    share = 1 - after / before if before else 0.0
    return Cell(share, short_percent(share), f"{percent(share)} removed<br>{before:,} → {after:,} parameters")


# ---------------------------------------------------------------- what the parts are made of


@dataclass(frozen=True)
class Unit:
    """Something that a part has a number of: what it is called, and the numbers before and after; None where a layer
    has none."""

    name: str
    numbers: Callable[[LayerRecord], tuple[int, int] | None]


def units_chart(record: RunRecord) -> Chart | None:
    """Layer by layer how many heads, neurons, experts and so on are left; None where as many are as before."""
    rows = {unit.name: [unit_cell(unit.numbers(layer)) for layer in record.layers] for unit in units()}
    rows = {name: row for name, row in rows.items() if any(cell and cell.share for cell in row)}
    if any(branches := [branch_cell(layer) for layer in record.layers]):
        rows["rank of the linear branch"] = branches
    if not rows:
        return None
    sentence = "How many are left, coloured by the share that was removed. Ranks are those of factored projections."
    return Chart("units-left", "What is left of each part", sentence, heat_map(rows, record.layers))


def unit_cell(numbers: tuple[int, int] | None) -> Cell | None:
    if numbers is None:
        return None
    before, after = numbers
    share = 1 - after / before
    return Cell(share, f"{after}" if share else "", f"{after} of {before} left ({percent(share)} removed)")


def branch_cell(layer: LayerRecord) -> Cell | None:
    """What was added, and so is coloured as nothing that was removed."""
    ffn = layer.pruned.ffn
    rank = ffn.branch_rank if isinstance(ffn, FeedForwardShape) else None
    return Cell(0.0, f"{rank}", f"a linear branch of rank {rank} was added") if rank else None


def units() -> Iterator[Unit]:
    """All that the page knows of, from attention to what is shared beside experts."""
    yield Unit("KV groups", of_attention(lambda shape: shape.kv_heads))
    yield Unit("rotary pairs of a head", of_attention(lambda shape: shape.query_key_dim // 2))
    yield Unit("width of a value head", of_attention(lambda shape: shape.value_dim))
    for name, full in {"query": query_width, "key": key_width, "output": value_width}.items():
        yield Unit(f"rank of the {name} projection", of_rank(f"{name}_rank", full))
    yield Unit("neurons", of_ffn(FeedForwardShape, lambda shape: shape.width))
    yield Unit("experts", of_ffn(ExpertsShape, lambda shape: shape.count))
    yield Unit("neurons of each expert", of_ffn(ExpertsShape, lambda shape: shape.width))
    yield Unit("neurons of the shared expert", of_ffn(ExpertsShape, shared_neurons))


def of_attention(number: Callable[[AttentionShape], int]) -> Callable[[LayerRecord], tuple[int, int] | None]:
    def numbers(layer: LayerRecord) -> tuple[int, int] | None:
        dense, pruned = layer.dense.attention, layer.pruned.attention
        return None if dense is None else (number(dense), number(pruned) if pruned else 0)

    return numbers


def of_rank(field: str, full: Callable[[AttentionShape], int]) -> Callable[[LayerRecord], tuple[int, int] | None]:
    """The rank of a projection, which is as large as its output or input allows where it is not factored."""

    def numbers(layer: LayerRecord) -> tuple[int, int] | None:
        dense, pruned = layer.dense.attention, layer.pruned.attention
        rank = getattr(pruned, field) if pruned else None
        return None if dense is None or rank is None else (full(dense), rank)

    return numbers


def query_width(shape: AttentionShape) -> int:
    return shape.query_heads * shape.query_key_dim


def key_width(shape: AttentionShape) -> int:
    return shape.kv_heads * shape.query_key_dim


def value_width(shape: AttentionShape) -> int:
    return shape.query_heads * shape.value_dim


def of_ffn(
    kind: type[FeedForwardShape] | type[ExpertsShape], number: Callable[..., int | None]
) -> Callable[[LayerRecord], tuple[int, int] | None]:
    def numbers(layer: LayerRecord) -> tuple[int, int] | None:
        dense, pruned = layer.dense.ffn, layer.pruned.ffn
        if not isinstance(dense, kind) or number(dense) is None:
            return None
        return number(dense), (number(pruned) or 0) if pruned else 0

    return numbers


def shared_neurons(shape: ExpertsShape) -> int | None:
    return shape.shared.width if shape.shared else None


# ---------------------------------------------------------------- how it is drawn


def heat_map(rows: dict[str, Row], layers: Sequence[LayerRecord]) -> go.Figure:
    """Layers from left to right, the rows from top to bottom, each cell coloured by the share that was removed."""
    figure = plain_figure(AROUND + ROW_HEIGHT * len(rows))
    has_text = len(layers) <= MOST_WITH_TEXT
    figure.add_heatmap(
        x=[layer.index for layer in layers],
        y=list(rows),
        z=[[cell and cell.share for cell in row] for row in rows.values()],
        text=[[cell.text if cell else "" for cell in row] for row in rows.values()],
        customdata=[[cell.hover if cell else "" for cell in row] for row in rows.values()],
        texttemplate="%{text}" if has_text else None,
        textfont={"size": 13 if len(layers) <= MOST_WITH_LARGE_TEXT else 10},
        hovertemplate="layer %{x}, %{y}<br>%{customdata}<extra></extra>",
        hoverongaps=False,
        zmin=0,
        zmax=1,
        xgap=1,
        ygap=2,
        colorbar={"tickformat": ".0%", "thickness": 12, "tickvals": [0, 0.5, 1], "outlinewidth": 0},
    )
    figure.update_xaxes(title_text="layer", showgrid=False, dtick=1 if has_text else None, zeroline=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticklabelstandoff=6)
    return figure


def short_percent(share: float) -> str:
    return f"{share:.0%}" if share else ""
