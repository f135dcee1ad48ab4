"""Every method on a mixture of experts, from a checkpoint to a checkpoint that transformers opens."""

from __future__ import annotations

import pytest
import torch
from kinds_of_methods import ALL_LAYERS, BRIEF
from transformers import AutoModelForCausalLM

from distprune import load
from distprune.methods import METHODS

#: The first layer has no experts.
QWEN = {
    "num_hidden_layers": 3,
    "mlp_only_layers": [0],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24,
}
WHOLE = {"mean-router-weight", "reap"}


@pytest.fixture(scope="module")
def qwen(save_model):
    return save_model("qwen2_moe", **QWEN)


@pytest.mark.filterwarnings("ignore::distprune.errors.ConvergenceWarning")
@pytest.mark.parametrize("method", METHODS)
def test_the_result_opens_and_has_lost_what_the_method_removes(prune_here, qwen, tmp_path, method):
    options = ALL_LAYERS.get(method, {}) | BRIEF.get(method, {})
    record = prune_here(tmp_path / "pruned", qwen, method=method, sparsity=0.2, options=options, distill=None)
    dense, pruned = AutoModelForCausalLM.from_pretrained(qwen), load(tmp_path / "pruned")
    before, after = (sum(p.numel() for p in model.model.layers.parameters()) for model in (dense, pruned))
    assert (record.decoder_parameters_before, record.decoder_parameters_after) == (before, after)
    one = dense.model.layers[1].mlp.experts
    expert = sum(tensor[0].numel() for tensor in one.parameters())
    step = 2 * (expert + 64) if method in WHOLE else 8 * 3 * 64 * 8
    assert abs(before - after - 0.2 * before) <= step
    for was, now in zip(dense.model.layers[1:], pruned.model.layers[1:], strict=True):
        if method in WHOLE:
            kept = now.mlp.experts.num_experts
            assert 2 <= kept < 8 and now.mlp.gate.weight.shape == (kept, 64)
            rows = (now.mlp.gate.weight[:, None] == was.mlp.gate.weight[None]).all(dim=2)
            numbers = rows.int().argmax(dim=1)
            assert torch.equal(now.mlp.experts.down_proj, was.mlp.experts.down_proj[numbers])
    ids = torch.arange(3, 15)[None]
    assert pruned(ids).logits.isfinite().all()
    assert pruned.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    if method in WHOLE:
        assert type(pruned) is type(dense) and pruned.config.num_experts == kept
