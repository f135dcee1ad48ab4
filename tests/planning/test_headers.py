"""Where headers come from, and that nothing else is read."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from local_hub import REPOSITORY, join, serving
from safetensors.torch import load_file, save_file

from distprune import InputError
from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.engine.run.preflight import dense_model
from distprune.planning import Cluster
from distprune.planning.model_from_headers import open_headers
from distprune.planning.scenario import make_scenario


def test_a_model_of_70_billion_parameters_is_planned_without_its_weights(plan, headers_70b, monkeypatch):
    def refuse(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    planned = plan(headers_70b, method="magnitude")
    assert planned.total_parameters_before == 70_553_706_496  # the number on its model card
    assert planned.layers == 80


@pytest.fixture
def hub(small, tmp_path, monkeypatch):
    with serving(small) as hub:
        join(hub, tmp_path / "cache", monkeypatch)
        yield hub


def test_a_hub_id_gives_what_its_folder_would_without_its_weights(hub, small):
    local, distant = Checkpoint.open(small), open_headers(REPOSITORY, revision="v1")
    assert {name: (info.shape, info.nbytes) for name, info in distant.tensors.items()} == {
        name: (info.shape, info.nbytes) for name, info in local.tensors.items()
    }
    assert dense_model(distant).architecture.dense_shapes == dense_model(local).architecture.dense_shapes
    assert hub.weights_sent() == set()


def test_a_head_that_is_stored_for_a_tied_embedding_is_that(save_model, tmp_path):
    folder = shutil.copytree(save_model(tie_word_embeddings=True), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_headers(str(folder))
    model = dense_model(checkpoint)
    assert model.names.on_disk(model.architecture.embedding_name) == "lm_head.weight"


def test_layers_that_are_stored_in_several_dtypes_take_the_bytes_that_they_have(save_model, tmp_path):
    folder = shutil.copytree(save_model(dtype=torch.bfloat16), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    wide = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name or "v_proj" in name}
    save_file(tensors | wide, folder / "model.safetensors")
    config = PruneConfig(model=str(folder), output=tmp_path / "pruned", sparsity=0, sequence_length=16)
    scenario = make_scenario(config, open_headers(str(folder)), Cluster(), "cpu", {})
    assert scenario.pruned_bytes == scenario.stored_bytes
    assert sum(scenario.pruned_bytes) == sum(
        tensor.nbytes for name, tensor in (tensors | wide).items() if ".layers." in name
    )


def test_a_hub_that_does_not_answer_is_bad_input(hub):
    hub.closed = True
    with pytest.raises(InputError, match=f"{REPOSITORY} is no file or folder here, and could not be fetched"):
        open_headers(REPOSITORY)


@pytest.mark.parametrize("source", ["./nope", "/nope", "~/nope", "a/b/c", "nope.gguf"])
def test_what_is_not_there_is_not_looked_for_on_the_hub(source):
    with pytest.raises(InputError, match="does not exist"):
        open_headers(source)


def test_a_gguf_file_gives_what_it_would_be_imported_as(tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(40)
    writer.add_tensor("token_embd.weight", np.zeros((40, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_headers(str(file))
    architecture = dense_model(checkpoint).architecture
    shape = architecture.dense_shape(0)
    assert (architecture.hidden_size, shape.ffn.width, shape.attention.kv_heads) == (32, 48, 2)
    assert checkpoint.tensors["model.embed_tokens.weight"].nbytes == 40 * 32 * 2


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf")
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not what it says")
    with pytest.raises(InputError, match="can't be read as GGUF"):
        open_headers(str(file))
