"""Modules that do nothing, as depth-upscaled models have them, and data that tell nothing: every method takes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from kinds_of_methods import BRIEF, OF_ALL_MODELS
from safetensors.torch import load_file, save_file

from distprune import load

Tensors = dict[str, torch.Tensor]
LAYERS = 3


def zeroed(*of_layers: Sequence[str]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for layer, names in enumerate(of_layers):
            for name in names:
                tensors[f"model.layers.{layer}.{name}.weight"].zero_()

    return change


def dead_neurons(tensors: Tensors) -> None:
    """In every layer, of the second half the neurons never fire and of the first heads the values are nothing."""
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.mlp.gate_proj.weight"][96:] = 0
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][96:] = 0
        tensors[f"model.layers.{layer}.self_attn.v_proj.weight"][:16] = 0


def one_token(tensors: Tensors) -> None:
    """All tokens look the same."""
    tensors["model.embed_tokens.weight"][:] = tensors["model.embed_tokens.weight"][:1].clone()


def no_input(tensors: Tensors) -> None:
    tensors["model.embed_tokens.weight"].zero_()


def no_gradient(tensors: Tensors) -> None:
    """Whatever the model does, it predicts all tokens alike."""
    tensors["model.norm.weight"].zero_()


OUTPUTS = "self_attn.o_proj", "mlp.down_proj"
PROJECTIONS = *OUTPUTS, *(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"
IDLE: dict[str, Callable[[Tensors], None]] = {
    "outputs": zeroed(OUTPUTS[:1], OUTPUTS[1:], OUTPUTS),
    "every layer": zeroed(OUTPUTS, OUTPUTS, OUTPUTS),
    "inputs": zeroed(["self_attn.v_proj"], ["self_attn.q_proj", "self_attn.k_proj"], ["mlp.gate_proj"]),
    "modules": zeroed(["mlp.up_proj"], PROJECTIONS, ["input_layernorm", "post_attention_layernorm"]),
    "neurons": dead_neurons,
    "same tokens": one_token,
    "no input": no_input,
    "no gradient": no_gradient,
}
GEOMETRIES = {"one group": {"num_key_value_heads": 1}, "groups of one": {"num_key_value_heads": 4}}
KINDS = [*((kind, {}) for kind in IDLE), *(("outputs", geometry) for geometry in GEOMETRIES.values())]
NAMES = [*IDLE, *GEOMETRIES]


@pytest.fixture(scope="module")
def idle_model(save_model) -> Callable[..., Path]:
    """A Llama of three layers with something idle in it."""

    @cache
    def make(kind: str, **geometry: int) -> Path:
        folder = save_model(num_hidden_layers=LAYERS, **geometry)
        tensors = load_file(folder / "model.safetensors")
        IDLE[kind](tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def assert_finite(folder: Path) -> None:
    """So are the weights, what the run's record says, and what the model makes of a text."""
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all(), name
    json.loads((folder / "distprune_run.json").read_text(), parse_constant=lambda what: pytest.fail(f"records {what}"))
    model = load(folder)
    assert model(torch.arange(2, 18)[None]).logits.isfinite().all()


@pytest.mark.parametrize(("kind", "geometry"), KINDS, ids=NAMES)
@pytest.mark.parametrize("method", OF_ALL_MODELS)
def test_every_method_takes_what_is_idle(prune_here, idle_model, tmp_path, method, kind, geometry):
    options = {"method": method, "options": BRIEF.get(method, {}), "distill": None}
    record = prune_here(tmp_path / "pruned", idle_model(kind, **geometry), **options)
    assert record.decoder_sparsity == pytest.approx(0.3, abs=0.05)
    assert_finite(tmp_path / "pruned")


@pytest.mark.parametrize("options", [{"radius": 1}, {"selection": "score"}, {"outlier_weight": 0}], ids=str)
@pytest.mark.parametrize("kind", IDLE)
def test_every_variant_of_oops_takes_what_is_idle(prune_here, idle_model, tmp_path, options, kind):
    prune_here(tmp_path / "pruned", idle_model(kind), method="oops", options=options, distill=None)
    assert_finite(tmp_path / "pruned")


@pytest.mark.parametrize("distill", [{}, {"train": "lora"}, {"objective": "logits"}], ids=["full", "lora", "logits"])
@pytest.mark.parametrize("kind", IDLE)
def test_what_is_idle_can_be_distilled(prune_here, idle_model, tmp_path, distill, kind):
    prune_here(tmp_path / "pruned", idle_model(kind), method="olica", distill={"batch": 2, **distill})
    assert_finite(tmp_path / "pruned")
