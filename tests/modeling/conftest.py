"""Pruned checkpoints of a small random Llama in each layout, and the dense models that compute the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_edits import (
    Edit,
    factored,
    fewer_groups,
    fewer_neurons,
    fewer_pairs,
    in_turn,
    narrower_values,
    with_biases,
    with_branch,
    without_attention,
    without_ffn,
)
from pruned_checkpoints import PrunedCheckpoint, write_pruned
from small_models import small_model
from torch import Tensor

#: All that the layout free can say, a layer without attention first and one with narrow caches second.
FREE: dict[int, Edit] = {
    0: without_attention,
    1: in_turn(fewer_pairs(2), narrower_values(5), fewer_neurons(40)),
    2: in_turn(narrower_values(6), factored(query=9, key=7, output=11), with_branch(3)),
    3: in_turn(fewer_groups(2), with_biases, fewer_neurons(33)),
    4: without_ffn,
}
HETEROGENEOUS: dict[int, Edit] = {
    1: in_turn(fewer_groups(2), fewer_neurons(40)),
    2: fewer_neurons(33),
    4: in_turn(fewer_groups(1), fewer_neurons(33)),
}
STOCK: dict[int, Edit] = dict.fromkeys(range(6), in_turn(fewer_groups(2), fewer_neurons(40)))
LAYOUTS = {"stock": STOCK, "heterogeneous": HETEROGENEOUS, "free": FREE}


@pytest.fixture(scope="session")
def pruned(tmp_path_factory) -> Callable[..., PrunedCheckpoint]:
    """Prunes a small model of six layers into a new folder."""

    def prune(layout: str = "free", model_type: str = "llama", **changes) -> PrunedCheckpoint:
        folder = tmp_path_factory.mktemp(layout) / "pruned"
        checkpoint = write_pruned(
            small_model(model_type, num_hidden_layers=6, **{"vocab_size": 323} | changes), LAYOUTS[layout], folder
        )
        assert checkpoint.layout == layout
        return checkpoint

    return prune


@pytest.fixture(scope="session", params=LAYOUTS)
def checkpoint(request, pruned) -> PrunedCheckpoint:
    """A Llama in each layout. Tests leave its oracle as it is."""
    return pruned(request.param)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
