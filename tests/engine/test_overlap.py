"""A run writes to its output, and beside it while it works: nothing that it reads may lie there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from distprune import InputError, compare, prune

REFUSED = r"a run writes there and to .*\.partial, and one of these is, holds or lies in "


def content(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def model(save_model, tmp_path) -> Path:
    return shutil.copytree(save_model(num_hidden_layers=3), tmp_path / "home" / "model")


@pytest.fixture
def refuses(prune_here, tmp_path):
    """Sees that a run is refused with that reason, and that it has touched nothing."""

    def refuse(output: Path, model: Path, reason: str, **options) -> None:
        before = content(tmp_path)
        for overwrite in (False, True):
            with pytest.raises(InputError, match=REFUSED + reason):
                prune_here(output, model, overwrite=overwrite, **options)
            assert content(tmp_path) == before

    return refuse


def test_the_model_itself(refuses, model):
    refuses(model, model, r"the model \(.*model\)")


def test_the_model_by_another_way_to_it(refuses, model, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(model)
    refuses(tmp_path / "link", model, "the model")
    refuses(model, tmp_path / "link", "the model")
    (tmp_path / "house").symlink_to(tmp_path / "home")
    refuses(tmp_path / "house" / "model", model, "the model")
    refuses(model / ".." / "model", model, "the model")
    monkeypatch.chdir(model)
    refuses(model, Path("."), "the model")


def test_a_folder_in_the_model_and_one_that_holds_it(refuses, model, tmp_path):
    refuses(model / "pruned", model, "the model")
    refuses(model / "deep" / "down", model, "the model")
    refuses(tmp_path / "home", model, "the model")


def test_a_model_where_the_run_would_work(refuses, model, tmp_path):
    work = tmp_path / "pruned.partial"
    shutil.copytree(model, work)
    refuses(tmp_path / "pruned", work, "the model")
    shutil.rmtree(work)
    work.symlink_to(model)
    refuses(tmp_path / "pruned", model, "the model")


def test_a_gguf_file_in_the_output(tmp_path):
    file = tmp_path / "pruned" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    with pytest.raises(InputError, match=REFUSED + r"the model \(.*gguf\)"):
        prune(str(file), file.parent, overwrite=True)
    assert file.read_bytes() == b"GGUF"


def test_a_calibration_set_in_the_output(refuses, model, calibrate, tmp_path):
    for folder in ("pruned", "pruned.partial"):
        (tmp_path / folder).mkdir()
        path = shutil.copyfile(calibrate(model), tmp_path / folder / "calibration.arrow")
        refuses(tmp_path / "pruned", model, "the calibration set", calibration=path)
        refuses(tmp_path / "pruned", model, "distillation's calibration set", distill={"calibration": path, "batch": 2})
        shutil.rmtree(tmp_path / folder)


@pytest.mark.parametrize("keep", [".", "kept"])
def test_a_comparison_that_would_keep_its_results_in_the_model(model, calibrate, tmp_path, keep):
    (tmp_path / "text.txt").write_text("The river runs down to the sea. " * 20)
    before, options = (
        content(tmp_path),
        {"methods": ["magnitude"], "sparsities": [0.3], "calibration": calibrate(model)},
    )
    with pytest.raises(InputError, match=REFUSED):
        next(iter(compare(str(model), text=tmp_path / "text.txt", keep=model / keep, overwrite=True, **options)))
    assert content(tmp_path) == before
    assert not os.path.exists(model / "kept")


def test_neighbours_are_no_overlap(prune_here, model, tmp_path):
    """Names that begin alike, and a model beside the output in one folder, are fine."""
    prune_here(model.with_name("model-pruned"), model, distill=False)
    assert (tmp_path / "home" / "model-pruned" / "config.json").is_file()
