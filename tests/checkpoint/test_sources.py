from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from distprune.checkpoint import hub, resolve_model, sources
from distprune.errors import InputError


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "snapshot_download", refuse)


def test_a_local_folder_is_returned_as_is(single_file):
    assert resolve_model(str(single_file)) == single_file


def test_a_relative_folder_and_the_home_folder_are_found(single_file, monkeypatch):
    monkeypatch.chdir(single_file.parent)
    monkeypatch.setenv("HOME", str(single_file.parent))
    assert resolve_model("single") == Path("single")
    assert resolve_model("./single").resolve() == single_file
    assert resolve_model("~/single") == single_file


@pytest.mark.parametrize("source", ["./nope", "../nope", "/nope", "~/nope", "a/b/c", "nope.gguf", "org/nope.gguf"])
def test_what_looks_like_a_path_but_is_not_there_is_refused(source):
    with pytest.raises(InputError, match=r"nope.* does not exist|a/b/c does not exist"):
        resolve_model(source)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))


def test_a_file_that_is_not_gguf_is_refused(single_file):
    with pytest.raises(InputError, match="is not a folder"):
        resolve_model(str(single_file / "model.safetensors"))


def test_pickled_weights_are_refused_with_the_way_to_convert(single_file):
    (single_file / "model.safetensors").rename(single_file / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*save_pretrained"):
        resolve_model(str(single_file))


def test_a_local_folder_has_no_revision(single_file):
    with pytest.raises(InputError, match="no revision v1"):
        resolve_model(str(single_file), revision="v1")


def test_a_gguf_file_is_imported_into_the_cache(single_file, tmp_path, monkeypatch):
    gguf = tmp_path / "model.Q4_0.GGUF"
    gguf.touch()
    asked = []
    monkeypatch.setattr(sources, "import_gguf", lambda *arguments: asked.append(arguments) or single_file)
    assert resolve_model(str(gguf), cache_dir=tmp_path / "cache") == single_file
    assert asked == [(gguf, tmp_path / "cache")]


@pytest.mark.parametrize("repository", ["gpt2", "org/model"])
def test_a_hub_id_is_downloaded_without_pickled_weights(single_file, tmp_path, monkeypatch, repository):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(single_file)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_model(repository, revision="v2", cache_dir=tmp_path) == single_file
    assert (asked["repo_id"], asked["revision"], asked["cache_dir"]) == (repository, "v2", tmp_path)

    def fetched(file):
        return not any(fnmatch(file, pattern) for pattern in asked["ignore_patterns"])

    wanted = [
        *(
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ),
        *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
        *("additional_chat_templates/tool.jinja", "LICENSE.md", "USE_POLICY.md", "NOTICE", "tokenization_x.py"),
    ]
    unwanted = ["pytorch_model.bin", "original/consolidated.00.pth", "model.gguf", "onnx/config.json", "a.h5"]
    assert [file for file in wanted if not fetched(file)] == []
    assert [file for file in unwanted if fetched(file)] == []


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("traffic is disabled"), OSError("404"), ValueError("name")])
def test_a_failed_download_names_the_repository_and_the_mend(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(
        InputError, match=r"org/model at revision v3 could not be fetched.*network.*hf auth login"
    ) as info:
        resolve_model("org/model", revision="v3")
    assert str(error) in str(info.value)


def test_offline_and_not_in_the_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "snapshot_download", huggingface_hub.snapshot_download)
    with pytest.raises(InputError, match="no-such-model is no file or folder here, and could not be fetched"):
        resolve_model("no-such-org/no-such-model", cache_dir=tmp_path)


def test_a_repository_without_safetensors_is_refused_by_its_name(single_file, monkeypatch):
    (single_file / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(single_file))
    with pytest.raises(InputError, match="org/old holds no safetensors weights"):
        resolve_model("org/old")
