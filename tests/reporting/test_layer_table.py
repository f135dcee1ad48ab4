"""What `inspect` shows of each layer."""

from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console

from distprune.engine.run.record import LayerRecord
from distprune.layers.shapes import AttentionShape, ExpertsShape, LayerShape
from distprune.reporting import layer_table

ATTENTION = AttentionShape(query_heads=8, kv_heads=4, query_key_dim=8, value_dim=8)


def printed(*layers: LayerRecord, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(layer_table(SimpleNamespace(layers=layers)))
    return console.file.getvalue().splitlines()


def test_a_mixture_has_its_experts_their_neurons_and_what_is_shared():
    dense = LayerShape(ATTENTION, ExpertsShape(128, 1024, shared_width=512))
    pruned = LayerShape(ATTENTION, ExpertsShape(96, 768, shared_width=512))
    lines = printed(LayerRecord(0, dense, pruned, 400, 300, {}, [], None), width=200)
    cells = ["0", "full/full/full", "4/4", "4/4", "8/8", "96x768+512/128x1024+512", "-", "25.0%"]
    assert cells in [line.split() for line in lines]


def test_no_digit_is_lost_in_a_narrow_terminal():
    shape = LayerShape(ATTENTION, ExpertsShape(128, 1024, shared_width=512))
    lines = printed(LayerRecord(0, shape, shape, 400, 400, {}, [], None))
    assert "…" not in "".join(lines)
