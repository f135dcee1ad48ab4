"""A run that is planned by a table of latencies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from latency_tables import by_parameters, made_up_table
from transformers import AutoConfig
from typer.testing import CliRunner
from without_ray import do_without_ray

import distprune
from distprune.cli import app
from distprune.config import PruneConfig
from distprune.engine.run.preflight import identity_of
from distprune.latency import predict
from distprune.layers.architecture import Architecture


@pytest.fixture
def table_file(dense_path, tmp_path) -> Path:
    file = tmp_path / "table.json"
    file.write_text(made_up_table(architecture(dense_path)).model_dump_json())
    return file


def architecture(path: Path) -> Architecture:
    return Architecture(AutoConfig.from_pretrained(path))


@pytest.fixture
def prune(dense_path, calibration_path, table_file, tmp_path, monkeypatch):
    do_without_ray(monkeypatch)
    options = {"calibration": calibration_path, "device": "cpu", "target": "latency", "latency_table": table_file}

    def run(**changes):
        return distprune.prune(str(dense_path), tmp_path / "pruned", overwrite=True, **options | changes)

    return run


@pytest.mark.parametrize("layout", ["free", "heterogeneous", "stock"])
def test_a_run_takes_the_fraction_of_the_decoders_seconds(prune, dense_path, layout):
    record = prune(sparsity=0.3, layout=layout)
    model = architecture(dense_path)
    shapes = [layer.pruned for layer in record.layers]
    assert record.latency == predict(made_up_table(model), shapes)

    def seconds(of: list) -> float:
        each = [by_parameters(model, index, shape) for index, shape in enumerate(of)]
        return sum(prefill + 10 * decode for prefill, decode in each)

    # What the grid's lines say is what the made-up machine takes. In the layout stock, a step of 8 neurons in each of
    # the layers is 4% of the whole.
    assert seconds(shapes) / seconds(model.dense_shapes) == pytest.approx(0.7, abs=0.025 if layout == "stock" else 0.02)
    prefill, decode = record.latency.workloads
    assert prefill.saved == pytest.approx(0.3, abs=0.05) and decode.saved == pytest.approx(0.3, abs=0.05)


def test_what_was_predicted_is_in_the_record_the_report_and_the_card(prune, tmp_path, table_file):
    record = prune(sparsity=0.3)
    folder = tmp_path / "pruned"
    assert distprune.inspect(folder) == record
    _, decode = record.latency.workloads
    dense, planned = decode.milliseconds_per_token
    shown = CliRunner().invoke(app, ["inspect", str(folder)]).stdout
    [row] = [line for line in shown.splitlines() if "decode, batch 1, 144 tokens before the new one" in line]
    assert f"{dense:.3f} ms a token" in row and f"{planned:.3f} ms a token" in row and f"{decode.saved:.1%}" in row
    assert f"Latencies are those of {table_file}: a test's device, float32, one thread." in record.notes
    assert "decode, batch 1, 144 tokens before the new one" in (folder / "report.html").read_text()
    card = (folder / "README.md").read_text()
    assert "30% of the measured latency of the decoder layers" in card
    assert f"decode, batch 1, 144 tokens before the new one, {dense:.3g} to {planned:.3g} ms a token." in card
    older = json.loads((folder / "distprune_run.json").read_text())
    del older["latency"]
    (folder / "distprune_run.json").write_text(json.dumps(older))
    assert distprune.inspect(folder).latency is None


def test_a_run_is_known_by_what_its_table_says_and_not_by_its_name(dense_path, table_file, tmp_path):
    def identity(file: Path) -> dict:
        config = PruneConfig(model="m", output="o", target="latency", latency_table=file, dtype="float32")
        return identity_of(config, "m", "cpu")

    copy, other = tmp_path / "copy.json", tmp_path / "other.json"
    copy.write_bytes(table_file.read_bytes())
    slower = made_up_table(architecture(dense_path), lambda *layer: 2 * by_parameters(*layer))
    other.write_text(slower.model_dump_json())
    assert identity(copy) == identity(table_file) != identity(other)


def test_a_method_that_plans_for_parameters_alone_is_refused(prune):
    with pytest.raises(distprune.InputError, match=r"--target latency: method oops can't plan for it.*curvature"):
        prune(method="oops")
