"""Pruning what was pruned before, in every layout."""

from __future__ import annotations

import json

import pytest
import torch
from kinds_of_methods import BRIEF, OF_ALL_MODELS
from safetensors.torch import load_file, save_file
from without_ray import do_without_ray

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


@pytest.fixture(scope="module")
def factored(prune_llama, save_model, calibrate, tmp_path_factory):
    """A model whose layers have factored projections and linear branches, or no attention any more."""
    output = tmp_path_factory.mktemp("factored") / "pruned"
    with pytest.MonkeyPatch.context() as patch:
        do_without_ray(patch)
        model = save_model(num_hidden_layers=3)
        prune_llama(output, model, method="olica", sparsity=0.2, distill=None)
    config = json.loads((output / "config.json").read_text())
    config["pruned_layers"]["2"]["attention"] = None
    (output / "config.json").write_text(json.dumps(config))
    gone = "model.layers.2.self_attn."
    kept = {name: tensor for name, tensor in stored(output).items() if not name.startswith(gone)}
    for file in output.glob("*.safetensors*"):
        file.unlink()
    save_file(kept, output / "model.safetensors", metadata={"format": "pt"})
    return output


@pytest.mark.parametrize("method", OF_ALL_MODELS)
@torch.no_grad()
def test_every_method_leaves_factored_attention_as_it_is(prune_here, factored, tmp_path, method):
    options = {"method": method, "options": BRIEF.get(method, {}), "distill": None}
    record = prune_here(tmp_path / "twice", factored, sparsity=0.1, **options)
    assert record.decoder_parameters_after < record.decoder_parameters_before
    before, after = stored(factored), stored(tmp_path / "twice")
    of_attention = [name for name in before if ".self_attn." in name]
    assert of_attention and of_attention == [name for name in after if ".self_attn." in name]
    for name in of_attention:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)
    assert load(tmp_path / "twice")(IDS).logits.isfinite().all()
