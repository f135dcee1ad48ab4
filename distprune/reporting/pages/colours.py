"""What charts look like, on a light page and on a dark one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plotly.colors import sample_colorscale

#: Of categories, in their order: readable on both pages.
CATEGORIES = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#06b6d4", "#84cc16", "#b45309", "#94a3b8")
#: Of what went wrong.
WRONG = "#ef4444"
#: From the first layer to the last: readable on both pages.
DEPTH = ("#0d9488", "#3b82f6", "#8b5cf6", "#ec4899", "#f97316")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

#: Text, lines of the grid, and how much was removed: from nothing to all.
LIGHT = {"text": "#334155", "grid": "#e2e8f0", "scale": ("#f1f5f9", "#dbeafe", "#93c5fd", "#2563eb", "#1e3a8a")}
DARK = {"text": "#cbd5e1", "grid": "#2a374d", "scale": ("#1e293b", "#1e3a8a", "#2563eb", "#93c5fd", "#eff6ff")}


def template(page: Mapping[str, Any]) -> dict[str, Any]:
    """Plotly's template for charts on that page."""
    scale = [[place / (len(page["scale"]) - 1), colour] for place, colour in enumerate(page["scale"])]
    lines = dict.fromkeys(("gridcolor", "linecolor", "zerolinecolor"), page["grid"])
    axis = {**lines, "automargin": True, "title": {"font": {"size": 13}}}
    return {
        "layout": {
            "font": {"color": page["text"], "family": FONT, "size": 13},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(CATEGORIES),
            "xaxis": axis,
            "yaxis": axis,
        },
        "data": {"heatmap": [{"colorscale": scale}]},
    }


TEMPLATES = {"light": template(LIGHT), "dark": template(DARK)}


def by_depth(layers: int) -> list[str]:
    """A colour for each layer."""
    return sample_colorscale(list(DEPTH), [index / max(1, layers - 1) for index in range(layers)])
