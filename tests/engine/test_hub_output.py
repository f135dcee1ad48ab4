"""A run whose output is on the hub is made on this machine, and uploaded when it is done."""

from __future__ import annotations

import shutil

import pytest

from distprune import InputError
from distprune.engine.run import hub_output
from distprune.errors import StorageFailed

REPOSITORY = "hf://org/pruned"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the hub: uploads are copies, and fail as long as ``hub.is_down``."""

    class Hub:
        is_down = False
        uploads = tmp_path / "hub"

        def upload(self, folder, destination, *, overwrite):
            if self.is_down:
                raise StorageFailed(f"{destination} can't be reached")
            shutil.copytree(folder, self.uploads)

        def check(self, destination, overwrite):
            if self.uploads.exists() and not overwrite:
                raise InputError(f"{destination} exists")

    hub = Hub()
    monkeypatch.setenv("DISTPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_output, "upload_folder", hub.upload)
    monkeypatch.setattr(hub_output, "check_destination", hub.check)
    return hub


def test_the_result_is_uploaded_and_nothing_stays_here(prune_here, digests, hub, tmp_path):
    record = prune_here(REPOSITORY)
    prune_here(tmp_path / "pruned")
    assert digests(hub.uploads) == digests(tmp_path / "pruned")
    assert record.decoder_sparsity > 0.2
    assert list((tmp_path / "cache" / "outputs").iterdir()) == []
    with pytest.raises(InputError, match="hf://org/pruned exists"):
        prune_here(REPOSITORY)


def test_what_could_not_be_uploaded_is_not_pruned_again_unless_it_is_another(prune_here, hub, monkeypatch, tmp_path):
    runs = []
    original = hub_output.load_record
    monkeypatch.setattr(hub_output, "load_record", lambda folder: runs.append("found") or original(folder))
    hub.is_down = True
    for sparsity in (0.3, 0.3, 0.4):
        with pytest.raises(StorageFailed, match="can't be reached"):
            prune_here(REPOSITORY, sparsity=sparsity)
    assert runs == ["found"]
    hub.is_down = False
    assert prune_here(REPOSITORY, sparsity=0.4).sparsity_asked == 0.4
    assert runs == ["found"] * 2
