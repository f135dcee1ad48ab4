"""Tensors that transformers converts on loading: read as it reads them, and written back as they lay on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import EXPERT_NEURONS, EXPERTS, HIDDEN, LAYERS
from tiny_mixtures import MIXTURES, mixture_config, mixture_model, with_experts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    core_model_loading,
)

from distprune.checkpoint import Checkpoint, TensorFiles
from distprune.errors import InputError
from distprune.families import reading
from distprune.families.disk_names import DiskNames, disk_names
from distprune.families.language_model import language_config
from distprune.families.reading import read_tensors

WEIGHTS = "model.safetensors"


class Opened:
    """A checkpoint, and what the language model in it is to the code under test."""

    def __init__(self, folder: Path):
        self.checkpoint = Checkpoint.open(folder)
        self.config = self.checkpoint.config
        is_alone = type(self.config) in AutoModelForCausalLM._model_mapping
        with torch.device("meta"):
            self.model = (AutoModelForCausalLM if is_alone else AutoModelForImageTextToText).from_config(self.config)
        said = disk_names(self.model, self.checkpoint).to_json()
        self.names = DiskNames.from_json(json.loads(json.dumps(said)))
        self.dims = {n: tuple(t.shape) for n, t in self.model.state_dict().items() if self.names.has(n)}

    def read(self, *names: str, experts: range | None = None) -> dict[str, torch.Tensor]:
        dims = {name: self.dims[name] for name in names or self.dims}
        return read_tensors(self.checkpoint, self.names, dims, self.config, experts)


def save(model_type: str, folder: Path, **changes) -> dict[str, torch.Tensor]:
    """Save a random model as transformers does. What lies on disk then."""
    mixture_model(model_type, **changes).save_pretrained(folder)
    return load_file(folder / WEIGHTS)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of a folder, nothing of it missing."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.state_dict()


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].dtype != expected[name].dtype] == []
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def fused_names(model: PreTrainedModel) -> list[str]:
    """The tensors that hold all experts' matrices of a layer."""
    return [name for name, tensor in model.state_dict().items() if ".experts." in name and len(tensor) == EXPERTS]


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def half_of_the_experts(state: dict[str, torch.Tensor], half: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every second expert, of all tensors of which ``half`` has half as much in some dimension."""
    kept, halved = torch.arange(1, EXPERTS, 2), dict(state)
    for name, tensor in half.state_dict().items():
        for dim, size in enumerate(tensor.shape):
            if name in state and state[name].shape[dim] != size:
                halved[name] = state[name].index_select(dim, kept)
    return halved


def record_reading(monkeypatch) -> list[int]:
    """The sizes of what is read from files from now on."""
    sizes: list[int] = []
    map_tensor = TensorFiles.map
    monkeypatch.setattr(TensorFiles, "map", lambda self, info: sizes.append(info.nbytes) or map_tensor(self, info))
    return sizes


# ---------------------------------------------------------------- every family


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_is_read_as_transformers_reads_it_and_written_back_as_it_was(model_type, tmp_path):
    on_disk, opened = save(model_type, tmp_path), Opened(tmp_path)
    assert fused_names(opened.model)
    state, expected = opened.read(), loaded(tmp_path)
    assert_equal(state, {name: expected[name] for name in opened.dims})
    assert_equal(opened.names.to_disk(state, opened.config), on_disk)
    assert_equal(opened.names.from_disk(on_disk, opened.dims, opened.config), state)
    assert opened.names.carried == ()


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_with_half_of_its_experts_opens_with_its_own_class(model_type, tmp_path):
    save(model_type, tmp_path / "whole")
    opened = Opened(tmp_path / "whole")
    config = with_experts(model_type, EXPERTS // 2)
    state = half_of_the_experts(opened.read(), on_meta(config))
    on_disk = opened.names.to_disk(state, opened.config)
    config.save_pretrained(tmp_path / "half")
    save_file(
        {name: tensor.contiguous() for name, tensor in on_disk.items()}, tmp_path / "half" / WEIGHTS, {"format": "pt"}
    )
    found = loaded(tmp_path / "half")
    assert_equal(state, {name: found[name] for name in opened.dims})
    assert on_disk.keys() <= opened.checkpoint.tensors.keys()
    dims = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert_equal(opened.names.from_disk(on_disk, dims, opened.config), state)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_some_experts_are_read_and_written_without_the_others(model_type, tmp_path, monkeypatch):
    on_disk, opened = save(model_type, tmp_path), Opened(tmp_path)
    fused, some = fused_names(opened.model), range(3, 8)
    whole = opened.read(*fused)
    monkeypatch.setattr(reading, "PIECE", 2 * max(whole[name][0].numel() for name in fused))
    assert_equal(opened.read(*fused), whole)
    sizes = record_reading(monkeypatch)
    part = opened.read(*fused, experts=some)
    assert_equal(part, {name: whole[name][3:8] for name in fused})
    assert sum(sizes) == sum(tensor.nbytes for tensor in part.values())
    for name, tensor in opened.names.to_disk(part, opened.config, first=3).items():
        stored = on_disk[name]
        assert torch.equal(tensor, stored if tensor.shape == stored.shape else stored[3:8])


# ---------------------------------------------------------------- how else they may lie


def rewrite(folder: Path, change: Callable[[dict], dict]) -> dict[str, torch.Tensor]:
    """Change what lies on disk. What does then."""
    changed = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / WEIGHTS, {"format": "pt"})
    return changed


def test_narrower_experts_are_written_so_that_their_own_class_opens_them(tmp_path):
    save("mixtral", tmp_path / "whole")
    opened, kept = Opened(tmp_path / "whole"), torch.arange(0, EXPERT_NEURONS, 3)
    state = opened.read()
    for name in fused_names(opened.model):
        if name.endswith("gate_up_proj"):
            state[name] = state[name].index_select(1, torch.cat((kept, EXPERT_NEURONS + kept)))
        else:
            state[name] = state[name].index_select(2, kept)
    mixture_config("mixtral", intermediate_size=len(kept)).save_pretrained(tmp_path / "narrow")
    on_disk = opened.names.to_disk(state, opened.config)
    save_file({name: t.contiguous() for name, t in on_disk.items()}, tmp_path / "narrow" / WEIGHTS, {"format": "pt"})
    assert_equal(loaded(tmp_path / "narrow"), state)


@pytest.mark.parametrize("is_transposed", [True, False])
def test_experts_that_transformers_transposes_if_need_be_are_written_as_they_lay(is_transposed, tmp_path):
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = MIXTURES["qwen3_moe"] | {"moe_intermediate_size": 24, "rope_scaling": {"mrope_section": [2, 1, 1]}}
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / WEIGHTS)
    if is_transposed:  # as on the hub
        on_disk = rewrite(tmp_path, lambda ts: {n: t.mT if ".experts." in n else t for n, t in ts.items()})
    opened = Opened(tmp_path)
    state, expected = opened.read(), AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    assert_equal(state, {name: expected[name] for name in opened.dims})
    written = opened.names.to_disk(state, opened.config)
    assert_equal(written, {name: on_disk[name] for name in written})
    fused = fused_names(opened.model)
    assert_equal(opened.read(*fused, experts=range(2, 4)), {name: state[name][2:4] for name in fused})


def test_a_language_model_within_one_with_vision_has_its_experts_where_the_whole_has_them(tmp_path):
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 16}
    config = AutoConfig.for_model("qwen3_5_moe", text_config=MIXTURES["qwen3_5_moe_text"], vision_config=vision)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(tmp_path)
    on_disk, checkpoint = load_file(tmp_path / WEIGHTS), Checkpoint.open(tmp_path)
    text, _ = language_config(checkpoint.config)
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(text)
    names = disk_names(language, checkpoint)
    dims = {name: tuple(tensor.shape) for name, tensor in language.state_dict().items()}
    state = read_tensors(checkpoint, names, dims, text)
    decoder = whole.get_decoder().state_dict()
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in decoder.items())
    written = names.to_disk(state, text)
    assert_equal(written, {name: on_disk[name] for name in written})
    assert {*written} | {*names.carried} == {*on_disk}
    assert names.carried and not any("language_model" in name for name in names.carried)


def test_experts_that_lie_together_are_written_together_though_the_family_stores_them_apart(tmp_path):
    model = mixture_model("mixtral")
    mixture_config("mixtral").save_pretrained(tmp_path)
    on_disk = model.state_dict()
    save_file(on_disk, tmp_path / WEIGHTS, {"format": "pt"})
    opened = Opened(tmp_path)
    assert_equal(opened.read(), loaded(tmp_path))
    assert_equal(opened.names.to_disk(opened.read(), opened.config), on_disk)


def test_a_base_models_experts_lack_the_prefix(tmp_path):
    save("mixtral", tmp_path, tie_word_embeddings=True)
    on_disk = rewrite(tmp_path, lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})
    opened = Opened(tmp_path)
    state = opened.read()
    assert_equal(opened.names.to_disk(state, opened.config), on_disk)
    assert_equal(state, {name: tensor for name, tensor in loaded(tmp_path).items() if name in state})


def test_a_mixture_of_one_expert_is_read(tmp_path):
    on_disk, opened = save("qwen3_moe", tmp_path, num_experts=1, num_experts_per_tok=1), Opened(tmp_path)
    assert_equal(opened.read(), loaded(tmp_path))
    assert_equal(opened.names.to_disk(opened.read(), opened.config), on_disk)


def test_layers_after_the_last_are_carried_with_their_experts(tmp_path):
    save("deepseek_v3", tmp_path)
    extra = {
        f"model.layers.{LAYERS}.mlp.experts.{i}.up_proj.weight": torch.ones(EXPERT_NEURONS, HIDDEN)
        for i in range(EXPERTS)
    }
    rewrite(tmp_path, lambda tensors: tensors | extra)
    assert {*Opened(tmp_path).names.carried} == {*extra}


def quantized(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in fp8, the scales of its blocks, and what both mean in bfloat16."""
    blocks = weight.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
    scale = blocks.abs().amax((1, 3)) / 448
    numbers = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    product = (numbers.double() * scale[:, None, :, None].double()).to(torch.bfloat16)
    return numbers.reshape(weight.shape), scale, product.reshape(weight.shape)


def test_experts_in_fp8_are_read_in_bfloat16_each_with_its_own_scales(tmp_path, monkeypatch):
    on_disk, block = save("deepseek_v3", tmp_path / "fp8", moe_intermediate_size=32), (16, 32)
    experts = {name: quantized(tensor, block) for name, tensor in on_disk.items() if ".experts." in name}
    numbers, scales, meant = ({name: each[n] for name, each in experts.items()} for n in range(3))
    scales = {f"{name}_scale_inv": scale for name, scale in scales.items()}
    rewrite(tmp_path / "fp8", lambda tensors: tensors | numbers | scales)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    save("deepseek_v3", tmp_path / "bf16", moe_intermediate_size=32, dtype=torch.bfloat16)
    rewrite(tmp_path / "bf16", lambda tensors: tensors | meant)

    opened = Opened(tmp_path / "fp8")
    fused, expected = fused_names(opened.model), loaded(tmp_path / "bf16")
    state = opened.read(*fused)
    assert_equal(state, {name: expected[name] for name in fused})
    assert_equal(opened.names.to_disk(state, opened.config), meant)
    sizes = record_reading(monkeypatch)
    assert_equal(opened.read(*fused, experts=range(5, 7)), {name: state[name][5:7] for name in fused})
    assert sum(sizes) == 2 * sum(t.nbytes for n, t in (numbers | scales).items() if ".experts.5." in n)


@pytest.mark.skipif(not hasattr(core_model_loading, "Split"), reason="this transformers knows equal pieces alone")
def test_pieces_of_unequal_sizes_are_parted_where_they_were_joined(tmp_path):
    heads = {f"linear_num_{kind}_heads": 4 for kind in ("key", "value")}
    sizes = {name: MIXTURES["mixtral"][name] for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    sizes |= heads | {"linear_key_head_dim": 6, "linear_value_head_dim": 12, "intermediate_size": 48, "pad_token_id": 0}
    sizes |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo_hybrid", **sizes)).save_pretrained(tmp_path)
    widths = {f"model.layers.0.linear_attn.{name}_conv1d.weight": w for name, w in (("q", 24), ("k", 24), ("v", 48))}
    convolutions = {name: torch.randn(width, 1, 4) for name, width in widths.items()}  # transformers saves three of 32
    on_disk = rewrite(tmp_path, lambda tensors: tensors | convolutions)
    opened = Opened(tmp_path)
    assert_equal(opened.read(), loaded(tmp_path))
    assert_equal(opened.names.to_disk(opened.read(), opened.config), on_disk)


# ---------------------------------------------------------------- what is refused

EXPERT = f"model.layers.{LAYERS - 1}.mlp.experts.{{}}.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ts: ts.pop(EXPERT.format(3)), rf"lacks 1 tensor\(s\).*: {EXPERT.format(3)}\. Check"),
        (
            lambda ts: [ts.pop(EXPERT.format(i)) for i in range(EXPERTS)],
            rf"lacks {EXPERTS} tensor\(s\).*: {EXPERT.format(0)}, {EXPERT.format(1)}, .*\.\.\. Check",
        ),
        (
            lambda ts: ts.update({EXPERT.format(3): torch.ones(31, HIDDEN)}),
            rf"{EXPERT.format(3)} in .*{WEIGHTS} has shape \(31, {HIDDEN}\), expected \({EXPERT_NEURONS}, {HIDDEN}\)",
        ),
        (
            lambda ts: ts.update({EXPERT.format(0): torch.ones(31, HIDDEN)}),
            rf"{EXPERT.format(0)} in .*{WEIGHTS} has shape \(31, {HIDDEN}\), expected \({EXPERT_NEURONS}, {HIDDEN}\)",
        ),
        (
            lambda ts: ts.update({EXPERT.format(EXPERTS): torch.ones(EXPERT_NEURONS, HIDDEN)}),
            rf"{WEIGHTS}: tensor {EXPERT.format(EXPERTS)} is of one expert more than config\.json calls for",
        ),
        (
            lambda ts: ts.update({EXPERT.format(3): torch.ones(EXPERT_NEURONS, HIDDEN, dtype=torch.int8)}),
            rf"{WEIGHTS}: tensor {EXPERT.format(3)} \(int8\) is part of a quantized checkpoint",
        ),
    ],
    ids=["missing", "missing in a layer", "narrow", "the first narrow", "one more", "integers"],
)
def test_an_experts_tensor_is_named_that_does_not_fit(change, words, tmp_path):
    save("qwen3_moe", tmp_path)

    def changed(tensors: dict) -> dict:
        change(tensors)
        return tensors

    rewrite(tmp_path, changed)
    with pytest.raises(InputError, match=words):
        Opened(tmp_path)


@pytest.mark.parametrize("rows", [EXPERTS - 1, EXPERTS + 1])
def test_experts_that_lie_together_are_as_many_as_there_should_be(rows, tmp_path):
    save("gpt_oss", tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.ones(rows, EXPERT_NEURONS, HIDDEN)})
    words = rf"{name} in .* has shape \({rows}, {EXPERT_NEURONS}, {HIDDEN}\), expected \({EXPERTS}, "
    with pytest.raises(InputError, match=words):
        Opened(tmp_path)
