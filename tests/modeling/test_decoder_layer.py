"""One decoder layer outside any model, as the engine runs it."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights

from distprune.modeling import PrunedDecoderLayer, RotaryEmbedding, causal_masks

MIXED_SLIDING = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def build_on_meta(config, index: int, context) -> PrunedDecoderLayer:
    with context:
        layer = PrunedDecoderLayer(config, index)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert list(layer.buffers()) == []
    return layer.eval()


def torch_meta_device():
    return torch.device("meta")


@pytest.mark.parametrize("context", [init_empty_weights, torch_meta_device])
@pytest.mark.parametrize("flags", [{}, MIXED_SLIDING, {"query_key_norm": True}])
@torch.no_grad()
def test_layers_run_alone_give_the_models_hidden_states(pruned_model, pruned_config, tokens, context, flags):
    model = pruned_model(**flags)
    expected = model(tokens, output_hidden_states=True).hidden_states

    config = pruned_config(**flags, attn_implementation="sdpa")
    hidden = model.model.embed_tokens(tokens)
    masks = causal_masks(config, hidden)
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    rotary = RotaryEmbedding(config)(hidden, positions)
    for index, dense in enumerate(model.model.layers):
        layer = build_on_meta(config, index, context())
        layer.load_state_dict(dense.state_dict(), assign=True)
        hidden = layer(hidden, attention_mask=masks[layer.layer_type], position_embeddings=rotary)
        if index < 2:  # the model's last hidden state is taken after its final norm
            torch.testing.assert_close(hidden, expected[index + 1])
    torch.testing.assert_close(model.model.norm(hidden), expected[-1])


@torch.no_grad()
def test_masks_are_made_for_each_layer_type_once(pruned_config):
    hidden = torch.zeros(1, 8, 64)
    config = pruned_config(**MIXED_SLIDING, attn_implementation="eager")
    masks = causal_masks(config, hidden)
    assert masks.keys() == {"full_attention", "sliding_attention"}
    steps_back = torch.arange(8)[:, None] - torch.arange(8)[None, :]
    assert torch.equal(masks["full_attention"][0, 0] == 0, steps_back >= 0)
    assert torch.equal(masks["sliding_attention"][0, 0] == 0, (steps_back >= 0) & (steps_back < 5))
    assert causal_masks(config, hidden, masks) is masks


def test_unpadded_windows_need_no_mask_tensor_with_sdpa(pruned_config):
    config = pruned_config(attn_implementation="sdpa")
    assert causal_masks(config, torch.zeros(2, 8, 64)) == {"full_attention": None}


@torch.no_grad()
def test_sequences_packed_in_one_row_do_not_see_each_other(pruned_model, tokens):
    model = pruned_model()
    first, second = tokens[:1, :10], tokens[1:, :14]
    positions = torch.cat([torch.arange(10), torch.arange(14)]).unsqueeze(0)
    packed = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :10], model(first).logits, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(packed[:, 10:], model(second).logits, atol=2e-5, rtol=2e-5)
