"""Pruned layers against a plain float64 numpy forward that multiplies every pair of factors out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distprune.modeling import Factorable, PrunedConfig, PrunedForCausalLM


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding of (tokens, width): coordinates i and i + width/2 are one complex number."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def reference_logits(model: PrunedForCausalLM, ids: np.ndarray) -> np.ndarray:
    """Logits (tokens, vocabulary) for the token ids of one sequence."""
    config: PrunedConfig = model.config
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def affine(name: str, x: np.ndarray) -> np.ndarray:
        parent, own = name.rsplit(".", 1)
        left, right = f"{parent}.left.{own}", f"{parent}.right.{own}"
        if f"{left}.weight" in state:
            weight, bias = state[f"{left}.weight"] @ state[f"{right}.weight"], state.get(f"{left}.bias", 0)
        else:
            weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias", 0)
        return x @ weight.T + bias

    def head_norm(name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, state[f"{name}.weight"], config.rms_norm_eps) if config.query_key_norm else x

    theta = config.rope_parameters["rope_theta"]
    steps_back = np.arange(len(ids))[:, None] - np.arange(len(ids))[None, :]
    x = state["model.embed_tokens.weight"][ids]
    for index in range(config.num_hidden_layers):
        layer, shape = f"model.layers.{index}", config.layer_shape(index)
        window = config.sliding_window if config.layer_types[index] == "sliding_attention" else len(ids)
        hidden_from = (steps_back < 0) | (steps_back >= window)

        y = rms_norm(x, state[f"{layer}.input_layernorm.weight"], config.rms_norm_eps)
        query, key, value = (affine(f"{layer}.self_attn.{part}_proj", y) for part in "qkv")
        queries = np.split(query, shape.query_heads, axis=-1)
        keys = np.split(key, shape.kv_heads, axis=-1)
        values = np.split(value, shape.kv_heads, axis=-1)
        outputs = []
        for head in range(shape.query_heads):
            group = head * shape.kv_heads // shape.query_heads
            q = rotate(head_norm(f"{layer}.self_attn.q_norm", queries[head]), theta)
            k = rotate(head_norm(f"{layer}.self_attn.k_norm", keys[group]), theta)
            scores = q @ k.T / np.sqrt(config.head_dim)
            scores[hidden_from] = -np.inf
            outputs.append(softmax(scores) @ values[group])
        x = x + affine(f"{layer}.self_attn.o_proj", np.concatenate(outputs, axis=-1))

        y = rms_norm(x, state[f"{layer}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = affine(f"{layer}.mlp.gate_proj", y), affine(f"{layer}.mlp.up_proj", y)
        feed_forward = affine(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        if shape.calibration_rank is not None:
            feed_forward = feed_forward + affine(f"{layer}.mlp.calibration", y)
        x = x + feed_forward
    x = rms_norm(x, state["model.norm.weight"], config.rms_norm_eps)
    return x @ state["lm_head.weight"].T


FLAGS = {
    "no flags": {},
    "every bias": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "query-key norm": {"query_key_norm": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "mixed sliding layers": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.fixture(params=FLAGS)
def model(request, pruned_model) -> PrunedForCausalLM:
    return pruned_model(**FLAGS[request.param])


@torch.no_grad()
def test_pruned_logits_equal_the_dense_float64_reference(model, tokens):
    logits = model.double()(tokens).logits
    for row, ids in zip(logits, tokens, strict=True):
        np.testing.assert_allclose(row.numpy(), reference_logits(model, ids.numpy()), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_eager_attention_equals_sdpa(model, tokens):
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(tokens).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens).logits, sdpa, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_close_to_float32(pruned_model, tokens, dtype):
    model = pruned_model()
    expected = model(tokens).logits
    logits = model.to(dtype)(tokens).logits
    assert logits.dtype == dtype
    # bfloat16 keeps 8 bits; through three layers that leaves a few percent.
    assert (logits.float() - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_eager_attention_gives_its_weights_per_layer(pruned_model, tokens):
    model = pruned_model(attn_implementation="eager")
    attentions = model(tokens, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, heads, 24, 24) for heads in (4, 3, 4)]
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@torch.no_grad()
def test_logits_to_keep_gives_only_the_chosen_positions(pruned_model, tokens):
    model = pruned_model()
    everything = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, everything[:, -3:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([4, 9])).logits, everything[:, [4, 9]])


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_token_ids(pruned_model, tokens):
    model = pruned_model()
    embeddings = model.model.embed_tokens(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=embeddings)


def test_a_factored_map_is_the_product_of_its_factors():
    torch.manual_seed(0)
    module, x = Factorable(), torch.randn(5, 10)
    module.add_linear("k_proj", 10, 7, rank=3, bias=True)
    state = module.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "right.k_proj.weight": (3, 10),
        "left.k_proj.weight": (7, 3),
        "left.k_proj.bias": (7,),
    }
    whole = state["left.k_proj.weight"] @ state["right.k_proj.weight"]
    torch.testing.assert_close(module.linear("k_proj", x), x @ whole.T + state["left.k_proj.bias"])


@torch.no_grad()
def test_flash_kernels_get_values_as_wide_as_keys(pruned_model, tokens, monkeypatch):
    widths = []

    def flash_stand_in(module, query, key, value, attention_mask, **kwargs):
        widths.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_stand_in", flash_stand_in)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "flash_stand_in", sdpa_mask)
    model = pruned_model()
    expected = model(tokens).logits
    model.config._attn_implementation = "flash_stand_in"
    torch.testing.assert_close(model(tokens).logits, expected, atol=2e-5, rtol=2e-5)
    assert widths == [(16, 16, 16)] * 3
