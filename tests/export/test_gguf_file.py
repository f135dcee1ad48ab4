"""The script that turns a plain Llama checkpoint into a GGUF file; transformers and llama.cpp judge what it writes."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from smollm2 import bundled_smollm2
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import distprune
from distprune.checkpoint import resolve_model
from distprune.modeling import PrunedConfig, PrunedForCausalLM

gguf = pytest.importorskip("gguf")

SCRIPT = Path(__file__).parents[2] / "scripts" / "to_gguf.py"
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
def to_gguf(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Runs the script on a folder and gives the file that it wrote."""

    def run(folder: Path, *options: str) -> Path:
        output = tmp_path / "model.gguf"
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), str(output), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
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
    file = to_gguf(folder, "--dtype", "f32")
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
    llama_cpp = pytest.importorskip("llama_cpp", LLAMA_CPP, exc_type=(ImportError, RuntimeError))
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
    found = llama_cpp_logits(llama_cpp_model(to_gguf(folder, "--dtype", "f32")), tokens)
    assert_same(found, logits_of(folder, tokens), 5e-3)


@pytest.fixture(scope="module")
def stock_smollm2(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("stock") / "pruned"
    sizes = {"samples": 16, "sequence_length": 64, "workers": 1}
    distprune.prune(
        str(resolve_model(str(bundled_smollm2()))), output, method="curvature", layout="stock", sparsity=0.3, **sizes
    )
    return output


@pytest.mark.slow
def test_a_pruned_smollm2_speaks_the_same_in_llama_cpp(to_gguf, stock_smollm2):
    speaker = llama_cpp_model(to_gguf(stock_smollm2))
    tokenizer = AutoTokenizer.from_pretrained(stock_smollm2)
    prompt = tokenizer(TEXT).input_ids
    assert speaker.tokenize(TEXT.encode()) == prompt
    assert_same(llama_cpp_logits(speaker, prompt)[-1], logits_of(stock_smollm2, prompt)[-1], 1e-2)
    model = AutoModelForCausalLM.from_pretrained(stock_smollm2, dtype=torch.float32)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    speaker.reset()
    found = [token for token, _ in zip(speaker.generate(prompt, temp=0.0), range(12), strict=False)]
    assert found[: len(expected)] == expected


# ---------------------------------------------------------------- what it refuses


def assert_refused(to_gguf, folder: Path, message: str, capsys, *options: str) -> None:
    with pytest.raises(SystemExit) as caught:
        to_gguf(folder, *options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_per_layer_checkpoint_is_refused(to_gguf, tmp_path, tokenizer, capsys):
    config = PrunedConfig(
        vocab_size=323, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    PrunedForCausalLM(config).save_pretrained(tmp_path / "own")
    assert_refused(to_gguf, tmp_path / "own", "Prune with --layout stock", capsys)


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("qwen2", {}, "is of a qwen2 model"),
        ("llama", {"attention_bias": True}, "have biases"),
        ("llama", {"hidden_act": "gelu"}, "not gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0}},
            "default, linear, llama3, not yarn",
        ),
    ],
)
def test_other_architectures_are_refused(to_gguf, save_model, model_type, changes, message, capsys):
    assert_refused(to_gguf, save_model(model_type, **changes), message, capsys)


def changed_tokenizer(folder: Path, change: Callable[[dict], None]) -> Path:
    file = folder / "tokenizer.json"
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))
    return folder


def test_an_unknown_way_to_split_text_needs_a_name(to_gguf, save_model, capsys, tmp_path):
    split = {"type": "Whitespace"}
    folder = changed_tokenizer(save_model(), lambda description: description.update(pre_tokenizer=split))
    assert_refused(to_gguf, folder, "Give llama.cpp's name for it with --pre", capsys)
    named = to_gguf(folder, "--pre", "smollm").rename(tmp_path / "named.gguf")
    copied = to_gguf(folder, "--pre", str(named))
    assert gguf.GGUFReader(copied).fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert_refused(to_gguf, folder, "nowhere.gguf does not exist", capsys, "--pre", "nowhere.gguf")


def test_digits_apart_are_smollm(to_gguf, save_model):
    def split_digits(description: dict) -> None:
        digits = {"type": "Digits", "individual_digits": True}
        description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, description["pre_tokenizer"]]}

    folder = changed_tokenizer(save_model(), split_digits)
    file = to_gguf(folder)
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == "smollm"
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert llama_cpp_model(file).tokenize(TEXT.encode()) == expected


def test_a_sentencepiece_tokenizer_is_refused(to_gguf, save_model, capsys):
    folder = changed_tokenizer(save_model(), lambda description: description["model"].update(byte_fallback=True))
    assert_refused(to_gguf, folder, "not a byte-level BPE tokenizer", capsys)


def test_weights_beyond_half_precision_are_refused_and_nothing_is_left(to_gguf, save_model, tmp_path, capsys):
    folder = save_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(folder)
    assert_refused(to_gguf, folder, "blk.2.ffn_up.weight", capsys)
    assert not list(tmp_path.glob("model*"))


def test_a_folder_that_is_no_checkpoint_is_refused(to_gguf, tmp_path, capsys):
    assert_refused(to_gguf, tmp_path, "holds no config.json", capsys)
