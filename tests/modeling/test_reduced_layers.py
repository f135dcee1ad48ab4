"""Layers without some rotary pairs, attention or FFN, against transformers' own dense models with zeros there."""

from __future__ import annotations

import pytest
import torch
from renamed import enable_checkpointing
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distprune.modeling import PrunedForCausalLM

WIDTH = 16  # of a dense head
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
SLIDING = {"sliding_window": 6, "layer_types": TYPES}
# Case: the original architecture, what its configuration is given beyond the tiny sizes, and the same said to ours.
CASES = {
    "llama": ("llama", {}, {}),
    "llama, every bias": (
        "llama",
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    ),
    "qwen2, some layers slide": ("qwen2", SLIDING | {"use_sliding_window": True}, SLIDING | {"attention_bias": True}),
}


def dense_state(model: PrunedForCausalLM, stock: PreTrainedModel) -> dict[str, Tensor]:
    """The stock model's weights, the reduced model's in their places and zeros where queries and outputs are gone."""
    state = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    reduced = model.state_dict()
    for name in state:
        if "layers" not in name:
            state[name] = reduced[name]
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        if layer.self_attn is None:
            zero(state, prefix + "self_attn.o_proj")
        else:
            place_attention(state, reduced, prefix)
        if layer.mlp is None:
            zero(state, prefix + "mlp.down_proj")
        else:
            place_ffn(state, reduced, prefix)
    return state


def zero(state: dict[str, Tensor], name: str) -> None:
    for tensor in (state[f"{name}.weight"], state.get(f"{name}.bias")):
        if tensor is not None:
            tensor.zero_()


def parts(reduced: dict[str, Tensor], name: str) -> list[tuple[str, Tensor]]:
    """Weight and bias of a projection, its factors multiplied out."""
    parent, own = name.rsplit(".", 1)
    left, right = f"{parent}.left.{own}", f"{parent}.right.{own}"
    if f"{left}.weight" in reduced:
        weight, bias = reduced[f"{left}.weight"] @ reduced[f"{right}.weight"], reduced.get(f"{left}.bias")
    else:
        weight, bias = reduced[f"{name}.weight"], reduced.get(f"{name}.bias")
    return [(f"{name}.weight", weight)] + ([] if bias is None else [(f"{name}.bias", bias)])


def place_attention(state: dict[str, Tensor], reduced: dict[str, Tensor], prefix: str) -> None:
    attention = prefix + "self_attn."
    pairs = reduced[attention + "rotary_pairs"].tolist()
    state[prefix + "input_layernorm.weight"] = reduced[prefix + "input_layernorm.weight"]
    zero(state, attention + "q_proj")  # the keys' other rows stay as random as they are: no query meets them
    for role, heads in (("q_proj", 4), ("k_proj", 2)):
        for name, tensor in parts(reduced, attention + role):
            for head, rows in enumerate(tensor.chunk(heads)):
                kept = pairs[head * 2 // heads]
                for row, pair in zip(rows, kept + [pair + WIDTH // 2 for pair in kept], strict=True):
                    state[name][head * WIDTH + pair] = row
    zero(state, attention + "v_proj")
    for name, tensor in parts(reduced, attention + "v_proj"):
        state[name].unflatten(0, (2, WIDTH))[:, : len(tensor) // 2] = tensor.unflatten(0, (2, -1))
    for name, tensor in parts(reduced, attention + "o_proj"):
        if name.endswith("bias"):
            state[name] = tensor
        else:
            state[name].unflatten(1, (4, WIDTH))[..., : tensor.shape[1] // 4] = tensor.unflatten(1, (4, -1))


def place_ffn(state: dict[str, Tensor], reduced: dict[str, Tensor], prefix: str) -> None:
    state[prefix + "post_attention_layernorm.weight"] = reduced[prefix + "post_attention_layernorm.weight"]
    for role in ("gate_proj", "up_proj"):
        for name, tensor in parts(reduced, f"{prefix}mlp.{role}"):
            state[name][: len(tensor)] = tensor
    zero(state, f"{prefix}mlp.down_proj")
    for name, tensor in parts(reduced, f"{prefix}mlp.down_proj"):
        state[name][..., : tensor.shape[-1]] = tensor


@pytest.fixture(params=CASES)
def pair(request, tiny, randomized, reduced_model) -> tuple[PreTrainedModel, PrunedForCausalLM]:
    model_type, theirs, ours = CASES[request.param]
    config = AutoConfig.for_model(model_type, **tiny | {"num_hidden_layers": 4} | theirs)
    stock = randomized(AutoModelForCausalLM.from_config(config), seed=5)
    reduced = reduced_model(**ours)
    stock.load_state_dict(dense_state(reduced, stock))
    return stock, reduced


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_logits_and_hidden_states_are_those_of_the_dense_model_with_zeros(pair, tokens):
    expected, actual = (model(tokens, output_hidden_states=True) for model in pair)
    close(actual.logits, expected.logits)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 5
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("kernel", ["eager", "stand_in"])
@torch.no_grad()
def test_every_kernel_gives_the_same(pair, tokens, kernel, monkeypatch):
    widths = []

    def stand_in(module, query, key, value, attention_mask, **kwargs):
        widths.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "stand_in", stand_in)
    # transformers makes masks only for kernels that it knows globally.
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "stand_in", sdpa_mask)
    stock, reduced = pair
    expected = stock(tokens).logits
    reduced.config._attn_implementation = kernel
    close(reduced(tokens).logits, expected)
    assert widths == ([] if kernel == "eager" else [(16, 16, 16), (6, 6, 6)])


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}],
    ids=["dynamic cache", "no cache", "static cache", "beams"],
)
def test_generated_tokens_are_those_of_the_dense_model_with_zeros(pair, tokens, options):
    expected = pair[0].generate(tokens, max_new_tokens=12, do_sample=False, num_beams=options.get("num_beams", 1))
    assert len(set(expected[:, 24:].flatten().tolist())) > 2
    found = pair[1].generate(tokens, max_new_tokens=12, do_sample=False, **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_left_padding_does_not_change_generation(pair, tokens, options):
    stock, reduced = pair
    short = tokens[:1, :9]
    batch = torch.cat([torch.cat([torch.zeros(1, 15, dtype=torch.long), short], dim=1), tokens[1:]])
    greedy = {"max_new_tokens": 12, "do_sample": False}
    together = reduced.generate(batch, attention_mask=(batch != 0).long(), **greedy, **options)
    assert together[0, 24:].tolist() == stock.generate(short, **greedy)[0, 9:].tolist()
    assert together[1].tolist() == stock.generate(tokens[1:], **greedy)[0].tolist()


@pytest.mark.parametrize("make_cache", [lambda config: None, lambda config: DynamicCache()], ids=["own", "given"])
@torch.no_grad()
def test_the_cache_holds_narrow_keys_of_the_attention_layers_alone(pair, tokens, make_cache):
    stock, reduced = pair
    output = reduced(tokens[:, :5], past_key_values=make_cache(reduced.config), use_cache=True)
    cache = output.past_key_values
    assert [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers] == [
        ((2, 2, 5, 10), (2, 2, 5, 16)),
        ((2, 2, 5, 6), (2, 2, 5, 4)),
    ]
    assert cache.get_seq_length() == 5
    close(reduced(tokens[:, 5:6], past_key_values=cache).logits, stock(tokens[:, :6]).logits[:, 5:])


@torch.no_grad()
def test_caches_slide_where_the_attention_layers_do(reduced_model, tokens):
    cache = reduced_model(**SLIDING)(tokens, use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [24, 5]


def test_gradients_are_those_of_the_dense_model_with_zeros(pair, tokens):
    stock, reduced = pair
    for model in pair:
        model(tokens, labels=tokens).loss.backward()
    found = {name: parameter.grad for name, parameter in reduced.named_parameters()}
    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    close(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
    attention = "model.layers.1.self_attn."
    pairs = reduced.model.layers[1].self_attn.rotary_pairs
    for head in range(4):
        rows = [*pairs[head // 2].tolist(), *(pairs[head // 2] + 8).tolist()]
        close(
            found[attention + "q_proj.weight"].chunk(4)[head],
            expected[attention + "q_proj.weight"].chunk(4)[head][rows],
        )
    assert [name for name, gradient in found.items() if gradient is None or not gradient.abs().sum() > 0] == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reduced_model, tokens, reentrant):
    model = reduced_model().train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, {"use_reentrant": reentrant})
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for recomputed, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_close_to_float32_and_leaves_indices_alone(reduced_model, tokens, dtype, tmp_path):
    model = reduced_model()
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    for half in (model.to(dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)):
        logits = half(tokens).logits
        assert logits.dtype == dtype
        assert half.model.layers[1].self_attn.rotary_pairs.dtype == torch.int64
        assert (logits.float() - expected).norm() / expected.norm() < 0.05


@torch.no_grad()
def test_attention_weights_are_given_for_the_layers_that_have_them(reduced_model, tokens):
    attentions = reduced_model(attn_implementation="eager")(tokens, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 24, 24)] * 2


@torch.no_grad()
def test_device_map_can_leave_any_of_these_layers_on_disk(reduced_model, tokens, tmp_path):
    model = reduced_model()
    model.save_pretrained(tmp_path / "saved")
    in_memory = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(in_memory, "cpu") | {f"model.layers.{index}": "disk" for index in (1, 2, 3)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    close(loaded(tokens).logits, model(tokens).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="auto").num_parameters() > 0


@torch.no_grad()
def test_layers_that_lack_a_part_hold_no_tensor_of_it(reduced_model):
    names = list(reduced_model().state_dict())
    assert not [name for name in names if name.startswith("model.layers.2.")]
    assert {name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")} == {
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }
    assert {name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")} == {
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.rotary_pairs",
    }
