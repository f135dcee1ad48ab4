"""A folder in which the commands and the Python of the documentation find what they name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from latency_tables import made_up_table
from small_texts import write_texts
from tiny_mixtures import MIXTURES
from transformers import AutoConfig
from without_ray import do_without_ray

import distprune
from distprune.layers.architecture import Architecture

#: Of the tests' tokenizer, not of a mixture.
OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
#: Long enough for the windows that the pages speak of.
POSITIONS = 256


@pytest.fixture(scope="session")
def furnished(save_model, tmp_path_factory) -> Path:
    """Tiny models, texts, calibration sets and pruned models, under the names that the pages give them."""
    folder = tmp_path_factory.mktemp("documentation")
    shutil.copytree(save_model(max_position_embeddings=POSITIONS), folder / "MODEL")
    sizes = {name: value for name, value in MIXTURES["mixtral"].items() if name not in OF_THE_TOKENIZER}
    shutil.copytree(save_model("mixtral", **sizes | {"max_position_embeddings": POSITIONS}), folder / "MIXTURE")
    write_texts(folder)
    model, calibration = str(folder / "MODEL"), folder / "calib.arrow"
    for name in ("calib", "more", "calibration"):
        text = [str(folder / "wikitext.txt")]
        distprune.calibrate(model, folder / f"{name}.arrow", text=text, samples=4, sequence_length=16)
    with pytest.MonkeyPatch.context() as patch:
        do_without_ray(patch)
        pruning = {"calibration": calibration, "method": "wanda-sp", "device": "cpu", "layout": "stock"}
        distprune.prune(model, folder / "pruned", **pruning)
        patch.chdir(folder)
        found = distprune.evaluate(["MODEL", "pruned"], "test.txt", sequence_length=16)
    architecture = Architecture(AutoConfig.from_pretrained(model))
    (folder / "table.json").write_text(made_up_table(architecture).model_dump_json())
    (folder / "results.json").write_text(json.dumps([asdict(each) for each in found]))
    for name, other in (("ORIGINAL", "MODEL"), ("PRUNED", "pruned")):
        (folder / name).symlink_to(other)
    return folder


@pytest.fixture
def here(furnished, tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of that folder, which is the current one; runs do without Ray."""
    folder = shutil.copytree(furnished, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setitem(os.environ, "DISTPRUNE_CACHE", str(tmp_path / "cache"))
    do_without_ray(monkeypatch)
    return folder
