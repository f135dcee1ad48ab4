"""How many calibration tokens each expert of a mixture has seen."""

from __future__ import annotations

from distprune.engine.run.record import RunRecord
from distprune.reporting.pages.cost_charts import layer_ticks
from distprune.reporting.pages.rendering import Chart, plain_figure

ROW_HEIGHT, AROUND, TALLEST = 24, 90, 700  # pixels


def expert_tokens_chart(record: RunRecord) -> Chart | None:
    """A row for each layer and a cell for each expert; None where the model is no mixture."""
    layers = [layer for layer in record.layers if layer.expert_tokens]
    if not layers:
        return None
    figure = plain_figure(min(TALLEST, AROUND + ROW_HEIGHT * len(layers)))
    figure.add_heatmap(
        y=[layer.index for layer in layers],
        z=[[seen / (sum(layer.expert_tokens) or 1) for seen in layer.expert_tokens] for layer in layers],
        customdata=[layer.expert_tokens for layer in layers],
        hovertemplate="layer %{y}, expert %{x}<br>%{customdata:,} tokens, %{z:.1%} of the layer's<extra></extra>",
        zmin=0,
        xgap=1,
        ygap=1,
        colorbar={"tickformat": ".0%", "thickness": 12, "outlinewidth": 0, "nticks": 4},
    )
    figure.update_xaxes(title_text="expert of the dense model", showgrid=False, zeroline=False)
    figure.update_yaxes(title_text="layer", autorange="reversed", zeroline=False, **layer_ticks(layers))
    sentence = (
        "Share of a layer's calibration tokens that each expert of the dense model saw. Little is known of experts "
        "that saw few."
    )
    return Chart("expert-tokens", "Tokens of each expert", sentence, figure)
