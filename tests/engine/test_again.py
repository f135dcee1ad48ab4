"""Pruning what was pruned before, in every layout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from distprune import load

IDS = torch.arange(3, 27).reshape(2, 12)


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("method", "layout"), [("magnitude", "stock"), ("wanda-sp", "heterogeneous"), ("olica", "free")]
)
@torch.no_grad()
def test_a_pruned_checkpoint_is_pruned_again(prune_here, save_model, calibrate, tmp_path, method, layout):
    model = save_model(num_hidden_layers=3)
    common = {"calibration": calibrate(model), "distill": None}
    once, twice, same = (tmp_path / name for name in ("once", "twice", "same"))
    first = prune_here(once, model, method=method, layout=layout, sparsity=0.2, **common)
    assert first.layout == layout
    nothing = prune_here(same, once, method="magnitude", sparsity=0.0, **common)
    assert nothing.layout == layout
    assert torch.equal(load(same)(IDS).logits, load(once)(IDS).logits)
    before, after = stored(once), stored(same)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    second = prune_here(twice, once, method="wanda-sp", sparsity=0.2, **common)
    assert second.decoder_parameters_before == first.decoder_parameters_after > second.decoder_parameters_after
    pruned = load(twice)
    assert pruned(IDS).logits.isfinite().all()
    assert sum(p.numel() for p in pruned.parameters()) == second.total_parameters_after
