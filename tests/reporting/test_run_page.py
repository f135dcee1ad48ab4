"""The report of a run says what its record says, and loads nothing from anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from html_pages import read_page

from distprune import InputError, inspect, report
from distprune.engine.run.record import LayerRecord, RunRecord
from distprune.engine.telemetry.process_memory import PeakMemory
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape
from distprune.methods import CostCurve
from distprune.reporting.pages import run_report
from distprune.reporting.pages.run_page import RunMaterial, run_page


@pytest.fixture(scope="module")
def distilled(run):
    """By the method that keeps its curves, on two workers."""
    return run(sparsity=0.3, method="curvature", workers=2, distill={"epochs": 2, "batch": 4, "learning_rate": 1e-3})


@pytest.fixture(scope="module")
def page(distilled):
    return read_page(distilled[0] / "report.html")


def record_of(*layers: LayerRecord, **changes) -> RunRecord:
    given = {
        "model": "m",
        "method": "curvature",
        "options": {},
        "layout": "free",
        "sparsity_asked": 0.25,
        "predicted_loss": None,
        "gap": None,
        "decoder_parameters_before": 2_000,
        "decoder_parameters_after": 1_500,
        "total_parameters_before": 3_000,
        "total_parameters_after": 2_500,
        "fingerprint": "f" * 64,
        "workers": 1,
        "device": "cpu",
        "dtype": "float32",
        "peak_memory_driver": PeakMemory(2**30, 0),
        "peak_memory_workers": [],
        "seconds": {"prune": 90.0},
    }
    return RunRecord(**given | changes, layers=list(layers))


def layer_of(index: int, dense: LayerShape, pruned: LayerShape, **more) -> LayerRecord:
    return LayerRecord(index, dense, pruned, 1_000, 750, {}, [], None, **more)


ATTENTION = AttentionShape(query_heads=4, kv_heads=2, query_key_dim=8, value_dim=8)
DENSE = LayerShape(ATTENTION, FeedForwardShape(64))
MIXTURE = LayerShape(ATTENTION, ExpertsShape(8, 64, shared_width=32, per_token=2))


# ------------------------------------------------------------------ figures


def test_figures_are_those_of_the_record(page, distilled):
    _, record = distilled
    assert page.values == pytest.approx(
        {
            "sparsity": record.decoder_sparsity,
            "decoder-parameters": record.decoder_parameters_after,
            "total-parameters": record.total_parameters_after,
            "bytes": record.bytes_after,
            "seconds": sum(record.seconds.values()),
            "predicted-loss": record.predicted_loss,
        }
    )
    assert page.texts["fingerprint"] == record.fingerprint
    assert "asked: 30%" in page.texts["sparsity"]


def test_the_bytes_are_those_of_the_weights_on_disk(distilled, dense_path):
    folder, record = distilled

    def tensor_bytes(folder):
        total = 0
        for file in folder.glob("*.safetensors"):
            content = file.read_bytes()
            total += len(content) - 8 - int.from_bytes(content[:8], "little")
        return total

    assert record.bytes_before == tensor_bytes(dense_path)
    assert record.bytes_after == tensor_bytes(folder)


def test_the_configuration_in_effect_is_there(page, distilled):
    assert page.texts["settings"] == (distilled[0] / "distprune_config.yaml").read_text()


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ("", "asked: 25%"),
        ("target: flops\n", "asked: 25% of the flops"),
        ("count_embeddings: true\n", "asked: 25% of the parameters of the whole model"),
    ],
)
def test_what_was_asked_for_says_of_what(settings, asked):
    page = read_page(run_page(RunMaterial(record_of(layer_of(0, DENSE, DENSE)), settings)))
    assert asked == page.texts["sparsity"].strip().partition("layers; ")[2]


@pytest.mark.parametrize(
    ("model", "title"),
    [
        ("/models/llama/big.gguf", "big.gguf"),
        ("s3://bucket/big", "big"),
        ("org/big", "org/big"),
    ],
)
def test_the_title_names_the_model(model, title):
    html = run_page(RunMaterial(record_of(layer_of(0, DENSE, DENSE), model=model)))
    assert f"<h1>{title}, curvature at 25%</h1>" in html


# ------------------------------------------------------------------ what was removed


def test_shares_of_parameters_by_part_are_the_records(page, distilled):
    _, record = distilled
    shares = page.heat_map("parameters-removed")
    assert list(shares) == ["attention", "feed-forward network", "whole layer"]
    for place, layer in enumerate(record.layers):
        assert shares["whole layer"][place] == pytest.approx(1 - layer.parameters_after / layer.parameters_before)
        before, after = layer.parts["attention"]
        assert shares["attention"][place] == pytest.approx(1 - after / before)


def test_parts_sum_to_their_layers(distilled):
    for layer in distilled[1].layers:
        before, after = map(sum, zip(*layer.parts.values(), strict=True))
        assert (before, after) == (layer.parameters_before, layer.parameters_after)


def test_units_that_are_left_are_the_shapes(page, distilled):
    _, record = distilled
    assert page.heat_map("units-left")["neurons"] == pytest.approx(
        [1 - (layer.pruned.ffn.width if layer.pruned.ffn else 0) / 192 for layer in record.layers]
    )


def test_a_mixture_tells_of_experts_and_their_neurons():
    narrowed = LayerShape(ATTENTION, ExpertsShape(6, 48, shared_width=16, per_token=2))
    layers = layer_of(0, DENSE, DENSE), layer_of(1, MIXTURE, narrowed, expert_tokens=[5, 15, 0, 20, 10, 30, 15, 5])
    page = read_page(run_page(RunMaterial(record_of(*layers))))
    assert page.heat_map("units-left") == {
        "experts": [None, 0.25],
        "neurons of each expert": [None, 0.25],
        "neurons of the shared expert": [None, 0.5],
    }
    assert page.trace("expert-tokens")["z"] == [[0.05, 0.15, 0, 0.2, 0.1, 0.3, 0.15, 0.05]]
    assert any("6x48+16/8x64+32" in row for row in page.rows)


def test_attention_that_went_whole_has_nothing_left():
    page = read_page(run_page(RunMaterial(record_of(layer_of(0, DENSE, replace(DENSE, attention=None))))))
    assert page.heat_map("units-left")["KV groups"] == [1]


def test_a_linear_branch_is_told_of_and_not_as_something_removed():
    branched = replace(DENSE, ffn=FeedForwardShape(48, branch_rank=8))
    layers = layer_of(0, DENSE, DENSE), layer_of(1, DENSE, branched)
    page = read_page(run_page(RunMaterial(record_of(*layers))))
    assert page.heat_map("units-left") == {"neurons": [0, 0.25], "rank of the linear branch": [None, 0]}
    assert page.trace("units-left")["text"][1] == ["", "8"]


def test_a_run_that_removed_nothing_has_no_chart_of_what_is_left():
    page = read_page(run_page(RunMaterial(record_of(layer_of(0, DENSE, DENSE)))))
    assert "parameters-removed" in page.charts
    assert "units-left" not in page.charts


# ------------------------------------------------------------------ what it cost


def test_predicted_and_measured_costs_are_the_records(page, distilled):
    _, record = distilled
    predicted = page.trace("predicted-cost")["y"]
    assert predicted == [layer.predicted_loss for layer in record.layers]
    assert sum(predicted) == pytest.approx(record.predicted_loss)
    after = page.trace("measured-error", "after distillation")["y"]
    assert after == [layer.distillation.held_out_after for layer in record.layers]


def test_cuts_are_marked_on_the_curves_of_the_layers_that_were_cut():
    curve = CostCurve([0, 32, 64], [4.0, 1.0, 0.0])
    narrow = replace(DENSE, ffn=FeedForwardShape(48))
    layers = [layer_of(i, DENSE, pruned, cost_curves={"ffn.width": curve}) for i, pruned in enumerate((DENSE, narrow))]
    page = read_page(run_page(RunMaterial(record_of(*layers))))
    *lines, cuts = page.charts["spectra"]["data"]
    assert [line["y"] for line in lines] == [[4.0, 1.0, None]] * 2
    assert (cuts["x"], cuts["y"], cuts["text"]) == ([48], [0.5], ["layer 1"])


def test_methods_that_keep_no_curves_have_no_spectra(pruned):
    page = read_page(pruned[0] / "report.html")
    assert "spectra" not in page.charts
    assert "predicted-cost" not in page.charts


def test_distillation_of_the_whole_model_is_one_curve(run):
    folder, record = run(sparsity=0.3, distill={"objective": "logits", "batch": 4})
    page = read_page(folder / "report.html")
    assert page.trace("distillation-loss")["y"] == record.layers[0].distillation.training
    assert "measured-error" not in page.charts


# ------------------------------------------------------------------ where the time went


def test_the_timeline_has_a_row_for_each_worker_and_the_runs_stages(page, distilled):
    events = [json.loads(line) for line in (distilled[0] / "distprune_log.jsonl").read_text().splitlines()]
    calls = [event for event in events if event["event"] == "call ended"]
    workers = {f"{call['node']}/{call['worker']}" for call in calls}
    bars = page.charts["timeline"]["data"]
    assert {worker for bar in bars for worker in bar["y"]} == workers
    assert set(page.charts["timeline"]["layout"]["yaxis"]["categoryarray"]) == workers
    assert {bar["name"] for bar in bars} == {call["stage"] for call in calls}


def test_seconds_of_stages_are_in_a_table(page, distilled):
    stages = [row[0] for row in page.rows]
    assert [stage for stage in stages if stage in distilled[1].seconds] == list(distilled[1].seconds)


# ------------------------------------------------------------------ the file


def test_nothing_is_loaded_from_anywhere(page):
    assert page.urls == []
    assert page.policy.startswith("default-src 'none'; script-src 'unsafe-inline'")


def test_names_can_be_no_markup():
    evil = "</script><script>alert(1)</script>"
    record = record_of(layer_of(0, DENSE, DENSE), model=evil, notes=[evil])
    html = run_page(RunMaterial(record, f"model: {evil!r}\n"))
    assert "<script>alert" not in html


def test_it_can_be_made_again_from_the_folder(distilled, tmp_path):
    written = report(distilled[0], output=tmp_path / "again.html")
    assert written == tmp_path / "again.html"
    assert written.read_text() == (distilled[0] / "report.html").read_text()


def test_a_record_of_an_earlier_version_has_a_report_too(distilled, tmp_path):
    stored = json.loads((distilled[0] / "distprune_run.json").read_text())
    for name in ("bytes_before", "bytes_after"):
        del stored[name]
    for layer in stored["layers"]:
        for name in ("parts", "predicted_loss", "cost_curves"):
            del layer[name]
    (tmp_path / "distprune_run.json").write_text(json.dumps(stored))
    page = read_page(report(tmp_path))
    assert list(page.heat_map("parameters-removed")) == ["whole layer"]
    assert "timeline" not in page.charts


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"distprune_run\.json: not found"):
        report(tmp_path)


# ------------------------------------------------------------------ a report that can't be drawn


def test_a_run_is_published_though_its_report_cant_be_drawn(run, digests, pruned, monkeypatch, caplog):
    def failing(material):
        raise RuntimeError("no ink")

    monkeypatch.setattr(run_report, "run_page", failing)
    folder, record = run(sparsity=0.3, max_shard_size=60_000)
    assert digests(folder) == digests(pruned[0])
    assert inspect(folder) == record
    assert not (folder / "report.html").exists()
    [warning] = [told.getMessage() for told in caplog.records if "report" in told.getMessage()]
    assert re.search(rf"no ink.*distprune report {folder}$", warning)
