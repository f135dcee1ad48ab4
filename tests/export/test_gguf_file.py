"""Llama and Mixtral checkpoints as GGUF files; transformers and llama.cpp judge what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from layer_edits import fewer_groups, fewer_neurons, in_turn, narrower_values
from mixture_edits import fewer_experts, narrower_experts
from pruned_checkpoints import write_pruned
from small_models import small_model
from smollm2 import bundled_smollm2
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from distprune.checkpoint import resolve_model
from distprune.errors import InputError

gguf = pytest.importorskip("gguf")

from distprune.export.gguf_file import export  # noqa: E402

TEXT = "The river runs to the sea in 1984, and what's left of it mends the hills."
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def to_gguf(tmp_path) -> Callable[..., Path]:
    """Exports a folder and gives the file that was written."""

    def run(folder: Path, **options: str) -> Path:
        output = tmp_path / "model.gguf"
        export(folder, output, **options)
        return output

    return run


@torch.no_grad()
def logits_of(folder: Path, tokens: list[int], **options) -> torch.Tensor:
    """(tokens, vocabulary) in float32, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model(torch.tensor([tokens])).logits[0]


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


SHAPES = {
    "grouped queries": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "a KV group gone": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_transformers_reads_the_same_model_back(to_gguf, save_model, changes):
    folder = save_model(**changes)
    file = to_gguf(folder, dtype="f32")
    tokens = list(range(3, 43))
    back = logits_of(file.parent, tokens, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True))
    assert_same(back, logits_of(folder, tokens), 1e-5)


def test_matrices_are_stored_in_half_precision_and_vectors_in_single(to_gguf, dense_path):
    tensors = gguf.GGUFReader(to_gguf(dense_path)).tensors
    types = {
        tensor.tensor_type.name: {len(other.shape) for other in tensors if other.tensor_type == tensor.tensor_type}
        for tensor in tensors
    }
    assert types == {"F16": {2}, "F32": {1}}


def test_the_tokenizer_comes_along(to_gguf, save_model, tokenizer):
    folder = save_model()
    file = to_gguf(folder)
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:2] == [gguf.TokenType.CONTROL] * 2
    assert kinds[-3:] == [gguf.TokenType.UNUSED] * 3
    back = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert back(TEXT, add_special_tokens=False).input_ids == tokenizer(TEXT, add_special_tokens=False).input_ids


# ---------------------------------------------------------------- llama.cpp


LLAMA_CPP = "needs llama.cpp: pip install 'distprune[llama-cpp]', which takes a compiler and some minutes"


def llama_cpp_model(file: Path):
    llama_cpp = pytest.importorskip("llama_cpp", reason=LLAMA_CPP, exc_type=(ImportError, RuntimeError))
    return llama_cpp.Llama(str(file), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False)


def llama_cpp_logits(model, tokens: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) in float32, by llama.cpp."""
    model.reset()
    model.eval(tokens)
    return torch.from_numpy(np.array(model.scores[: len(tokens)]))


@pytest.mark.parametrize(
    "changes", [*SHAPES.values(), {"rope_parameters": LLAMA3_ROPE}], ids=[*SHAPES, "llama3 rotary embedding"]
)
def test_llama_cpp_computes_the_same_logits(to_gguf, save_model, changes):
    folder = save_model(**changes)
    tokens = list(range(3, 43))
    found = llama_cpp_logits(llama_cpp_model(to_gguf(folder, dtype="f32")), tokens)
    assert_same(found, logits_of(folder, tokens), 5e-3)


EDITS = {
    "llama": dict.fromkeys(range(4), in_turn(fewer_neurons(100), fewer_groups(1))),
    "deci": {1: in_turn(fewer_neurons(100), fewer_groups(1)), 2: fewer_neurons(64)},
}


@pytest.mark.parametrize("architecture", EDITS)
def test_llama_cpp_computes_the_same_logits_for_pruned_models(to_gguf, save_model, tmp_path, tokenizer, architecture):
    dense = AutoModelForCausalLM.from_pretrained(save_model())
    pruned = write_pruned(dense, EDITS[architecture], tmp_path / "pruned")
    tokenizer.save_pretrained(pruned.folder)
    file, tokens = to_gguf(pruned.folder, dtype="f32"), list(range(3, 43))
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == architecture
    with torch.no_grad():
        expected = pruned.oracle(torch.tensor([tokens])).logits[0]
    assert_same(llama_cpp_logits(llama_cpp_model(file), tokens), expected, 5e-3)


MIXTURE = {"num_local_experts": 8, "num_experts_per_tok": 2}
OF_MIXTURE = in_turn(narrower_experts(64), fewer_experts(5), fewer_groups(1))


@pytest.mark.parametrize("edits", [{}, dict.fromkeys(range(4), OF_MIXTURE)], ids=["whole", "pruned"])
def test_llama_cpp_computes_the_same_logits_for_a_mixture_of_experts(to_gguf, save_model, tmp_path, tokenizer, edits):
    dense = AutoModelForCausalLM.from_pretrained(save_model("mixtral", **MIXTURE))
    pruned = write_pruned(dense, edits, tmp_path / "pruned")
    assert pruned.layout == "stock"
    tokenizer.save_pretrained(pruned.folder)
    tokens = list(range(3, 43))
    with torch.no_grad():
        expected = pruned.oracle(torch.tensor([tokens])).logits[0]
    assert_same(llama_cpp_logits(llama_cpp_model(to_gguf(pruned.folder, dtype="f32")), tokens), expected, 5e-3)


def test_experts_are_written_together_from_whatever_they_are_on_disk(to_gguf, save_model):
    folder = save_model("mixtral", **MIXTURE)  # where transformers stores each expert by itself
    model = AutoModelForCausalLM.from_pretrained(folder)
    mixture = model.model.layers[2].mlp
    gate, up = mixture.experts.gate_up_proj.chunk(2, dim=1)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(to_gguf(folder, dtype="f32")).tensors}
    expected = {
        "gate_exps": gate,
        "up_exps": up,
        "down_exps": mixture.experts.down_proj,
        "gate_inp": mixture.gate.weight,
    }
    for name, tensor in expected.items():
        assert np.array_equal(tensors[f"blk.2.ffn_{name}.weight"], tensor.detach().numpy()), name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EDITS)
def test_a_pruned_smollm2_speaks_the_same_in_llama_cpp(to_gguf, tmp_path, architecture):
    source = resolve_model(str(bundled_smollm2()))
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    narrow, layers = fewer_neurons(1408), dense.config.num_hidden_layers
    edits = {
        "llama": dict.fromkeys(range(layers), narrow),
        "deci": dict.fromkeys(range(0, layers, 3), in_turn(narrow, fewer_groups(2))),
    }
    pruned = write_pruned(dense, edits[architecture], tmp_path / "pruned")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(pruned.folder)
    speaker = llama_cpp_model(to_gguf(pruned.folder))
    prompt = tokenizer(TEXT).input_ids
    assert speaker.tokenize(TEXT.encode()) == prompt
    with torch.no_grad():
        logits = pruned.oracle(torch.tensor([prompt])).logits[0]
    assert_same(llama_cpp_logits(speaker, prompt)[-1], logits[-1], 1e-2)
    generated = pruned.oracle.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    expected = generated[0, len(prompt) :].tolist()
    speaker.reset()
    found = [token for token, _ in zip(speaker.generate(prompt, temp=0.0), range(12), strict=False)]
    assert found[: len(expected)] == expected


# ---------------------------------------------------------------- what it refuses


def assert_refused(to_gguf, folder: Path, message: str, **options: str) -> None:
    with pytest.raises(InputError) as caught:
        to_gguf(folder, **options)
    assert message in str(caught.value)


def test_a_free_checkpoint_is_refused(to_gguf, tmp_path):
    pruned = write_pruned(small_model(), {1: narrower_values(5)}, tmp_path / "free")
    assert pruned.layout == "free"
    assert_refused(to_gguf, pruned.folder, "Prune with --layout heterogeneous or --layout stock")


def test_a_mixture_whose_layers_differ_is_refused(to_gguf, save_model, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(save_model("mixtral", **MIXTURE))
    pruned = write_pruned(dense, {1: fewer_experts(4)}, tmp_path / "pruned")
    assert_refused(to_gguf, pruned.folder, "no mixtures of experts whose layers differ. Prune with --layout stock")


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("qwen2", {}, "is of a qwen2 model"),
        ("llama", {"attention_bias": True}, "have biases"),
        ("mixtral", {"num_local_experts": 4, "sliding_window": 8}, "sliding window"),
        ("llama", {"hidden_act": "gelu"}, "not gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0}},
            "default, linear, llama3, not yarn",
        ),
    ],
)
def test_other_architectures_are_refused(to_gguf, save_model, model_type, changes, message):
    assert_refused(to_gguf, save_model(model_type, **changes), message)


def changed_tokenizer(folder: Path, change: Callable[[dict], None]) -> Path:
    file = folder / "tokenizer.json"
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))
    return folder


def test_an_unknown_way_to_split_text_needs_a_name(to_gguf, save_model, capsys, tmp_path):
    split = {"type": "Whitespace"}
    folder = changed_tokenizer(save_model(), lambda description: description.update(pre_tokenizer=split))
    assert_refused(to_gguf, folder, "Give llama.cpp's name for it with --pre")
    named = to_gguf(folder, pre="smollm").rename(tmp_path / "named.gguf")
    copied = to_gguf(folder, pre=str(named))
    assert gguf.GGUFReader(copied).fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert_refused(to_gguf, folder, "nowhere.gguf does not exist", pre="nowhere.gguf")


def test_digits_apart_are_smollm(to_gguf, save_model):
    def split_digits(description: dict) -> None:
        digits = {"type": "Digits", "individual_digits": True}
        description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, description["pre_tokenizer"]]}

    folder = changed_tokenizer(save_model(), split_digits)
    file = to_gguf(folder)
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == "smollm"
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert llama_cpp_model(file).tokenize(TEXT.encode()) == expected


def test_a_sentencepiece_tokenizer_is_refused(to_gguf, save_model):
    folder = changed_tokenizer(save_model(), lambda description: description["model"].update(byte_fallback=True))
    assert_refused(to_gguf, folder, "not a byte-level BPE tokenizer")


def test_weights_beyond_half_precision_are_refused_and_nothing_is_left(to_gguf, save_model, tmp_path):
    folder = save_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(folder)
    assert_refused(to_gguf, folder, "blk.2.ffn_up.weight")
    assert not list(tmp_path.glob("model*"))


def test_a_folder_that_is_no_checkpoint_is_refused(to_gguf, tmp_path):
    assert_refused(to_gguf, tmp_path, "holds no config.json")
