"""Checkpoints put in folders, object stores and on the hub: whole or not at all."""

from __future__ import annotations

import inspect
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from local_hub import ACCOUNT

from distprune import storage
from distprune.checkpoint import check_destination, hub_access, read_published, upload, upload_folder
from distprune.errors import InputError, StorageFailed
from distprune.storage import location


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make(tmp_path / "checkpoint", "new", ["model-1.safetensors", "tokenizer/vocab.txt"])


def make(folder: Path, mark: str, names: list[str]) -> Path:
    for name in ["config.json", "distprune_run.json", *names]:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{mark} {name}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


# ------------------------------------------------------------------ folders


def test_a_folder_is_copied_and_appears_by_one_rename(checkpoint, tmp_path):
    for destination in (str(tmp_path / "shop" / "a"), f"file://{tmp_path}/shop/b"):
        upload_folder(checkpoint, destination)
    assert contents(tmp_path / "shop" / "a") == contents(tmp_path / "shop" / "b") == contents(checkpoint)
    assert sorted(os.listdir(tmp_path / "shop")) == ["a", "b"]
    assert read_published(str(tmp_path / "shop" / "a"), "distprune_run.json") == b"new distprune_run.json"
    assert read_published(str(tmp_path / "shop" / "a"), "none.json") is None
    assert read_published(str(tmp_path / "shop" / "c"), "distprune_run.json") is None


def test_a_copy_that_fails_leaves_the_old_checkpoint_and_nothing_else(checkpoint, tmp_path, monkeypatch):
    old = make(tmp_path / "shop" / "model", "old", ["old.safetensors"])
    before = contents(old)
    with pytest.raises(InputError, match=r"model exists\. Choose another"):
        upload_folder(checkpoint, str(old))

    def fail(source, target):
        shutil.copyfile(checkpoint / "config.json", target / "config.json")
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(upload.shutil, "copytree", lambda source, target: (target.mkdir(), fail(source, target)))
        with pytest.raises(StorageFailed, match=r"model can't be reached.*disk on fire"):
            upload_folder(checkpoint, str(old), overwrite=True)
    assert contents(old) == before
    assert os.listdir(tmp_path / "shop") == ["model"]
    upload_folder(checkpoint, str(old), overwrite=True)
    assert contents(old) == contents(checkpoint)


# ------------------------------------------------------------------ object stores


@pytest.fixture
def bucket(s3_environment):
    """A bucket of a test's own, through s3fs."""
    storage = fsspec.filesystem("s3", skip_instance_cache=True)
    storage.mkdir("models")
    yield storage
    storage.rm("models", recursive=True)


def stored(storage, root: str = "models/a") -> dict[str, bytes]:
    storage.invalidate_cache()
    return {path.removeprefix(f"{root}/"): storage.cat_file(path) for path in storage.find(root)}


def test_an_object_store_gets_every_file_and_loses_those_of_the_old_checkpoint(bucket, checkpoint, tmp_path):
    old = make(tmp_path / "old", "old", ["model-7.safetensors"])
    upload_folder(old, "s3://models/a")
    assert stored(bucket) == contents(old)
    with pytest.raises(InputError, match=r"s3://models/a exists\. Choose another destination"):
        upload_folder(checkpoint, "s3://models/a")
    upload_folder(checkpoint, "s3://models/a/", overwrite=True)
    assert stored(bucket) == contents(checkpoint)
    assert read_published("s3://models/a", "distprune_run.json") == b"new distprune_run.json"
    assert read_published("s3://models/other", "distprune_run.json") is None


@pytest.mark.parametrize("last", ["distprune_run.json", "model-1.safetensors", "config.json"])
def test_a_half_uploaded_checkpoint_never_opens_and_the_next_attempt_completes_it(
    bucket, checkpoint, tmp_path, monkeypatch, last
):
    old = make(tmp_path / "old", "old", ["model-7.safetensors"])
    upload_folder(old, "s3://models/a")
    storage = location("s3://models/a").fs  # the one that uploads use
    put = storage.put_file

    def fail_at_last(source, target):
        if target.endswith(last):
            raise OSError("the line is dead")
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_file", fail_at_last)
        with pytest.raises(StorageFailed, match=r"s3://models/a can't be reached.*the line is dead"):
            upload_folder(checkpoint, "s3://models/a", overwrite=True)
    assert "config.json" not in stored(bucket)
    assert read_published("s3://models/a", "distprune_run.json") is None
    upload_folder(checkpoint, "s3://models/a")  # it is ours, so there is nothing to overwrite
    assert stored(bucket) == contents(checkpoint)


def test_a_large_file_goes_in_parts(bucket, checkpoint):
    """So that it is never in memory whole: the store counts the parts behind a hyphen."""
    with (checkpoint / "model-1.safetensors").open("wb") as file:
        file.truncate(120 * 2**20)
    upload_folder(checkpoint, "s3://models/a")
    info = bucket.info("models/a/model-1.safetensors")
    assert (info["size"], info["ETag"].strip('"').partition("-")[2]) == (120 * 2**20, "3")


def test_what_is_no_checkpoint_is_never_overwritten(bucket, checkpoint):
    bucket.pipe_file("models/a/thesis.tex", b"years of work")
    with pytest.raises(InputError, match=r"s3://models/a is not overwritten: it holds files but no config\.json"):
        upload_folder(checkpoint, "s3://models/a", overwrite=True)
    assert stored(bucket) == {"thesis.tex": b"years of work"}


def test_a_missing_bucket_is_known_before_anything_is_sent(s3_environment):
    with pytest.raises(InputError, match=r"s3://none/a: there is no bucket 'none'"):
        check_destination("s3://none/a")


def test_a_missing_package_and_an_unknown_protocol_are_named(monkeypatch):
    def missing(url, **_):
        raise ImportError(f"Install a client to access {url}")

    with pytest.raises(InputError, match=r"s4://b/a: Unsupported filesystem: 's4'"):
        check_destination("s4://b/a")
    monkeypatch.setattr(storage, "UPath", type("UPath", (), {"__new__": lambda _, url, **__: missing(url)}))
    for scheme in ("s3", "gs"):
        with pytest.raises(InputError, match=rf"{scheme}://b/a: .* pip install 'distprune\[{scheme}\]'"):
            check_destination(f"{scheme}://b/a")


# ------------------------------------------------------------------ the hub


class Hub:
    """What of the hub's client an upload asks, by the client's own names; repositories are folders."""

    def __init__(self, root: Path):
        self.root, self.made, self.commits = root, [], 0

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        real = getattr(HfApi, name, None)
        if real is None:
            return found

        def checked(*arguments, **options):
            inspect.signature(real).bind(self, *arguments, **options)
            return found(*arguments, **options)

        return checked

    def create_repo(self, repository, private, exist_ok):
        self.made.append((repository, private))
        (self.root / repository).mkdir(parents=True, exist_ok=exist_ok)

    def list_repo_files(self, repository):
        if not (self.root / repository).is_dir():
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return [".gitattributes", *contents(self.root / repository)]

    def whoami(self):
        return ACCOUNT

    def upload_folder(self, repo_id, folder_path, ignore_patterns, delete_patterns, commit_message):
        self.commits += 1
        for pattern in delete_patterns:
            for file in (self.root / repo_id).glob(pattern):
                file.unlink()
        ignored = shutil.ignore_patterns(*ignore_patterns)
        shutil.copytree(folder_path, self.root / repo_id, ignore=ignored, dirs_exist_ok=True)

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id, commit_message):
        self.commits += 1
        shutil.copyfile(path_or_fileobj, self.root / repo_id / path_in_repo)

    def hf_hub_download(self, repository, name):
        return str(self.root / repository / name)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    for module in (upload, hub_access):
        monkeypatch.setattr(module, "HfApi", lambda: hub)
    monkeypatch.setattr(hub_access, "get_token", lambda: "token")
    return hub


def test_what_matches_a_pattern_does_not_go_to_the_hub(hub, checkpoint):
    upload_folder(checkpoint, "hf://org/model", hub_ignore=["*_run.json"])
    everything = contents(checkpoint)
    assert "distprune_run.json" in everything
    assert contents(hub.root / "org" / "model").keys() == everything.keys() - {"distprune_run.json"}


def test_the_hub_gets_config_json_last_and_someone_elses_model_card_stays(hub, checkpoint, tmp_path):
    old = make(tmp_path / "old", "old", ["model-7.safetensors"])
    upload_folder(old, "hf://org/model")
    (hub.root / "org" / "model" / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"hf://org/model exists"):
        upload_folder(checkpoint, "hf://org/model")
    upload_folder(checkpoint, "hf://org/model", overwrite=True, private=False)
    assert contents(hub.root / "org" / "model") == {**contents(checkpoint), "README.md": b"mine"}
    assert hub.made == [("org/model", True), ("org/model", False)]
    assert hub.commits == 4
    assert read_published("hf://org/model", "distprune_run.json") == b"new distprune_run.json"
    assert read_published("hf://org/none", "distprune_run.json") is None


def test_a_repository_that_was_made_beforehand_is_filled(hub, checkpoint):
    hub.create_repo("org/model", private=True, exist_ok=True)
    (hub.root / "org" / "model" / "README.md").write_text("mine")
    upload_folder(checkpoint, "hf://org/model")
    assert contents(hub.root / "org" / "model") == {**contents(checkpoint), "README.md": b"mine"}


def test_a_model_card_of_distprunes_own_is_replaced(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\ntags:\n- distprune\n---\nof the first")
    upload_folder(checkpoint, "hf://org/model")
    (checkpoint / "README.md").write_text("---\ntags:\n- distprune\n---\nof the second")
    upload_folder(checkpoint, "hf://org/model", overwrite=True)
    assert contents(hub.root / "org" / "model") == contents(checkpoint)


def test_an_upload_that_ended_early_opens_nowhere_and_is_gone_on_with(hub, checkpoint, monkeypatch):
    upload_file = hub.upload_file

    def fail(**_):
        raise OSError("the line is dead")

    hub.upload_file = fail
    with pytest.raises(StorageFailed, match="the line is dead"):
        upload_folder(checkpoint, "hf://org/model")
    assert read_published("hf://org/model", "distprune_run.json") is None
    hub.upload_file = upload_file
    upload_folder(checkpoint, "hf://org/model")
    assert contents(hub.root / "org" / "model") == contents(checkpoint)


def test_a_malformed_repository_and_a_missing_token_are_refused(hub, monkeypatch):
    with pytest.raises(InputError, match=r"hf://a/b/c: is no repository .* Write hf://ORGANIZATION/NAME"):
        check_destination("hf://a/b/c")
    monkeypatch.setattr(hub_access, "get_token", lambda: None)
    with pytest.raises(InputError, match=r"hf://org/model: the hub asks for a token\. Set HF_TOKEN"):
        check_destination("hf://org/model")
