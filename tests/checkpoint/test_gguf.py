from __future__ import annotations

import errno
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from distprune.checkpoint import Checkpoint, import_gguf
from distprune.checkpoint import gguf as importer
from distprune.errors import InputError, StorageFailed

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.weight"


def gguf_rows(name: str, weights: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """GGUF keeps the two halves of each rotary pair side by side in Q and K."""
    for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
        if projection in name:
            halves = weights.reshape(count, 2, weights.shape[0] // count // 2, -1)
            return halves.swapaxes(1, 2).reshape(weights.shape)
    return weights


def write_gguf(file: Path, model: LlamaForCausalLM, left_out: str = "") -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("A Title In Plain Words")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    # Two merges: transformers before 5.17 takes a list of one for a text.
    merged = ["ab", "cd"]
    writer.add_token_list([chr(33 + number) for number in range(94)] + [f"<{number}>" for number in range(32)] + merged)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        if name != left_out:
            weights = tensor.float().numpy()
            writer.add_tensor(
                gguf_name(name),
                gguf_rows(name, weights, config.num_attention_heads, config.num_key_value_heads),
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tiny_model, tmp_path) -> Path:
    file = tmp_path / "tiny.F32.gguf"
    write_gguf(file, tiny_model)
    return file


def test_the_imported_checkpoint_is_the_model_the_file_holds(gguf_file, tiny_model, single_file, tmp_path, capfd):
    folder = import_gguf(gguf_file, tmp_path / "cache")
    assert capfd.readouterr().err == ""
    assert folder.parent == tmp_path / "cache" / "gguf"
    assert folder.name.startswith("tiny.F32-")
    found = Checkpoint.open(folder).read(tiny_model.state_dict())
    for name, tensor in tiny_model.state_dict().items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, original = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)(tokens).logits
            for model in (folder, single_file)
        )
    assert torch.equal(ours, original)
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids


def test_config_and_generation_config_name_no_other_model_and_no_quantization(gguf_file, tmp_path):
    folder = import_gguf(gguf_file, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"_model_name_or_path", "quantization_config"} & set(config)
    assert "A Title In Plain Words" not in (folder / "config.json").read_text()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


def test_the_second_import_finds_the_first(gguf_file, tmp_path, monkeypatch):
    folder = import_gguf(gguf_file, tmp_path)
    monkeypatch.setattr(importer, "_load", None)
    assert import_gguf(gguf_file, tmp_path) == folder


def test_another_content_gets_another_folder(gguf_file, tiny_model, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(importer, "_convert", lambda path, folder: made.append(folder))
    import_gguf(gguf_file, tmp_path)
    gguf_file.write_bytes(gguf_file.read_bytes() + b"\x00")
    import_gguf(gguf_file, tmp_path)
    assert made[0] != made[1]


def test_the_environment_names_the_cache(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "_convert", lambda path, folder: None)
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "elsewhere"))
    assert import_gguf(gguf_file).parent == tmp_path / "elsewhere" / "gguf"
    monkeypatch.delenv("DISTPRUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert import_gguf(gguf_file).parent == tmp_path / ".cache" / "distprune" / "gguf"


def test_a_crash_while_saving_leaves_nothing_half_made(gguf_file, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(importer, "sync_tree", dies)
        import_gguf(gguf_file, tmp_path)
    assert not [folder for folder in (tmp_path / "gguf").glob("tiny*") if folder.suffix not in (".partial", ".lock")]
    Checkpoint.open(import_gguf(gguf_file, tmp_path))
    assert not list((tmp_path / "gguf").glob("*.partial"))


@pytest.mark.parametrize("damage", [lambda d: d[:-5000], lambda d: d[:900], lambda d: b"", lambda d: b"hello" * 99])
def test_a_broken_file_is_named_and_leaves_no_folder(gguf_file, tmp_path, damage):
    gguf_file.write_bytes(damage(gguf_file.read_bytes()))
    with pytest.raises(InputError, match=r"tiny\.F32\.gguf can't be read as GGUF.*Download it again"):
        import_gguf(gguf_file, tmp_path)
    assert not [entry for entry in (tmp_path / "gguf").iterdir() if entry.is_dir()]


def test_weights_that_are_not_in_the_file_are_never_made_up(tiny_model, tmp_path):
    file = tmp_path / "holes.gguf"
    write_gguf(file, tiny_model, left_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        InputError, match=r"holes\.gguf lacks 1 of the model's tensors \(model\.layers\.1\.mlp\.up_proj"
    ):
        import_gguf(file, tmp_path)


def test_no_such_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nope\.gguf does not exist"):
        import_gguf(tmp_path / "nope.gguf")


def test_a_piece_of_a_split_file_is_refused(tmp_path):
    piece = tmp_path / "model-00001-of-00003.gguf"
    piece.touch()
    with pytest.raises(InputError, match="llama-gguf-split --merge"):
        import_gguf(piece)


def test_without_the_gguf_package_the_mend_is_named(gguf_file, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(InputError, match="pip install gguf"):
        import_gguf(gguf_file)


@pytest.mark.parametrize("problem", ["a file in its place", "no permission"])
def test_a_cache_that_cannot_be_written_is_named_with_its_variable(gguf_file, tmp_path, monkeypatch, problem):
    cache = tmp_path / "cache"
    if problem == "no permission":

        def refuse(dir):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

        monkeypatch.setattr(importer.tempfile, "TemporaryFile", refuse)  # root may write anywhere
    else:
        cache.write_text("")
    monkeypatch.setenv("DISTPRUNE_CACHE", str(cache))
    with pytest.raises(InputError, match=r"cache/gguf can't be written to \(.*\).*tiny\.F32\.gguf.*DISTPRUNE_CACHE"):
        import_gguf(gguf_file)


def test_what_others_have_imported_is_found_in_a_cache_that_cannot_be_written(gguf_file, tmp_path, monkeypatch):
    folder = import_gguf(gguf_file, tmp_path / "cache")
    (tmp_path / "cache" / "gguf" / f"{folder.name}.lock").unlink()
    monkeypatch.setattr(importer, "FileLock", None)
    assert import_gguf(gguf_file, tmp_path / "cache") == folder


def test_a_full_disk_under_the_cache_is_told_and_leaves_nothing_behind(gguf_file, tmp_path, monkeypatch):
    def fill(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fill)
    with pytest.raises(StorageFailed, match=r"tiny\.F32.*No space left on device.*Free some space"):
        import_gguf(gguf_file, tmp_path / "cache")
    assert not [folder for folder in (tmp_path / "cache" / "gguf").iterdir() if folder.is_dir()]
