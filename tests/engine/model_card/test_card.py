"""A pruned checkpoint says what it is: in words, and in metadata as the hub reads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from local_hub import REPOSITORY, join, serving

import distprune
from distprune import InputError
from distprune.checkpoint import find_on_hub
from distprune.config import load_config
from distprune.evaluation import ModelEvaluation, PerplexityResult

CARD = """---
license: llama3.1
license_link: LICENSE
language: [en, de]
pipeline_tag: text2text-generation
base_model: somebody/else
tags: [facebook]
model-index: nonsense
---
# The original
"""
PLAIN = {"method": "magnitude", "layout": "stock", "distill": False}


@pytest.fixture(scope="session")
def with_card(llama, tmp_path_factory) -> Path:
    """The Llama with a model card and a licence."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("with card") / "Llama-9B")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Be kind.")
    return folder


@pytest.fixture
def pruned(prune_here, with_card, tmp_path) -> Path:
    prune_here(tmp_path / "pruned", with_card)
    return tmp_path / "pruned"


def card(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text())


def perplexity(value: float) -> PerplexityResult:
    return PerplexityResult(value, 1.0, 12345, 100, 128, 1.0, "float32")


def test_a_card_has_the_originals_licence_and_languages_and_says_what_was_done(pruned):
    found, record = card(pruned), distprune.inspect(pruned)
    assert found.data.to_dict() == {
        "license": "llama3.1",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text2text-generation",
        "tags": ["distprune", "pruning", "olica", "distillation"],
    }
    assert found.text.lstrip().startswith("# Llama-9B-distprune-144K\n")
    for said in (
        "https://arxiv.org/abs/2506.08436",
        "removal of 30% of the parameters of the decoder layers",
        f"| all | {record.total_parameters_before:,} | {record.total_parameters_after:,} |",
        "on 8 windows of 16 tokens of random.",
        "trust_remote_code=True",
        "With llama.cpp: not in this layout.",
        "No evaluation was given",
        "[ORIGINAL_README.md](ORIGINAL_README.md)",
    ):
        assert said in found.text
    assert (pruned / "ORIGINAL_README.md").read_text() == CARD
    assert not [line for line in found.content.splitlines() if line != line.rstrip()]


def test_the_card_names_no_place_of_the_machine_that_made_it(pruned, with_card, tmp_path):
    assert str(tmp_path) not in card(pruned).content
    assert str(with_card.parent) not in card(pruned).content


def test_the_configuration_in_the_card_is_that_of_the_run(pruned, tmp_path):
    run = load_config(pruned / "distprune_config.yaml", {})
    (tmp_path / "run.yaml").write_text(card(pruned).text.partition("```yaml\n")[2].partition("```")[0])
    again = load_config(tmp_path / "run.yaml", {})
    assert again.decisive() == run.decisive()
    assert (again.model, str(again.calibration), str(again.output)) == (
        *("Llama-9B", "calibration.arrow", "Llama-9B-distprune-144K"),
    )


def test_a_stock_checkpoint_opens_plainly(prune_here, llama, tmp_path):
    prune_here(tmp_path / "pruned", **PLAIN)
    found = card(tmp_path / "pruned")
    assert "trust_remote_code" not in found.text and "--trust-remote-code" not in found.text
    assert "distprune export" in found.text and "not trained afterwards" in found.text
    assert found.data.tags == ["distprune", "pruning", "magnitude"]
    assert "ORIGINAL_README.md" not in found.text


@pytest.mark.parametrize("options", [PLAIN, {}])
def test_a_model_of_the_hub_is_the_base_model_and_its_commit_is_in_the_configuration(
    prune_here, with_card, calibrate, tmp_path, monkeypatch, options
):
    with serving(with_card) as hub:
        join(hub, tmp_path / "cache", monkeypatch)
        prune_here(tmp_path / "pruned", Path(REPOSITORY), calibration=calibrate(with_card), **options)
        commit = find_on_hub(REPOSITORY).commit
    found = card(tmp_path / "pruned")
    assert found.data.base_model == REPOSITORY
    # Of the relations that the hub knows, adapter, merge, quantized and finetune, only a trained model has one.
    assert found.data.get("base_model_relation") == (None if options else "finetune")
    told = yaml.safe_load(found.text.partition("```yaml\n")[2].partition("```")[0])
    assert (told["model"], told["revision"]) == (REPOSITORY, commit)
    assert f"https://huggingface.co/{REPOSITORY}" in found.text


def test_a_card_made_again_is_the_same_until_it_has_results(pruned, with_card, tmp_path):
    first = card(pruned).content
    distprune.card(pruned)
    assert card(pruned).content == first
    evaluation = [
        ModelEvaluation(str(with_card), perplexity(12.345), {"quiz": {"acc": 0.5}}, None, "texts/wiki.txt"),
        ModelEvaluation(
            str(pruned), perplexity(13.3), {"quiz": {"acc": 0.4, "acc_stderr": 0.1}}, None, "texts/wiki.txt"
        ),
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps([asdict(each) for each in evaluation]))
    distprune.card(pruned, file, base_model="org/Llama-9B")
    with_results = card(pruned).content
    for said in (
        "| perplexity | 12.35 | 13.30 |",
        "| quiz, acc | 0.5000 | 0.4000 |",
        "on wiki.txt, over 12,345 tokens in windows of 128",
        "base_model: org/Llama-9B",
    ):
        assert said in with_results
    assert "stderr" not in with_results
    distprune.card(pruned, evaluation, base_model="org/Llama-9B")
    assert card(pruned).content == with_results
    distprune.card(pruned, evaluation[1:])
    assert "| perplexity |  | 13.30 |" in card(pruned).content


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "Invalid JSON"), ("[3]", "0: "), ("[]", "holds no model")],
)
def test_a_file_that_is_no_evaluation_of_it_is_refused(pruned, tmp_path, content, reason):
    before = card(pruned).content
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=reason):
        distprune.card(pruned, tmp_path / "results.json")
    others = [ModelEvaluation(name, perplexity(2.0), {}, None) for name in ("a", "b")]
    with pytest.raises(InputError, match=r"not among what was evaluated \(a, b\)"):
        distprune.card(pruned, others)
    with pytest.raises(InputError, match=r"none\.json: can't be read"):
        distprune.card(pruned, tmp_path / "none.json")
    assert card(pruned).content == before


def test_a_folder_that_no_run_made_is_refused(llama):
    with pytest.raises(InputError, match="Give the output folder of a distprune prune run"):
        distprune.card(llama)


@pytest.mark.parametrize("broken", ["---\n: [\n---\n", "---\n- a\n---\n", "no metadata", "---\nlicense: mit", "\udcff"])
def test_an_original_card_that_the_hub_would_refuse_is_kept_and_gives_nothing(prune_here, llama, tmp_path, broken):
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "README.md").write_bytes(broken.encode(errors="surrogateescape"))
    prune_here(tmp_path / "pruned", model, **PLAIN)
    assert card(tmp_path / "pruned").data.license is None
    assert (tmp_path / "pruned" / "ORIGINAL_README.md").read_bytes() == (model / "README.md").read_bytes()


def test_a_pruned_model_that_is_pruned_again_has_its_own_card_for_the_original(prune_here, with_card, tmp_path):
    prune_here(tmp_path / "once", with_card, **PLAIN)
    prune_here(tmp_path / "twice", tmp_path / "once", **PLAIN)
    assert (tmp_path / "twice" / "ORIGINAL_README.md").read_text() == (tmp_path / "once" / "README.md").read_text()
    assert card(tmp_path / "twice").data.license == "llama3.1"


def test_how_to_open_it_depends_on_the_layout_and_on_what_went(prune_here, tmp_path):
    prune_here(tmp_path / "layers", method="curvature", layout="heterogeneous", distill=False)
    found = card(tmp_path / "layers").text
    assert "trust_remote_code=True" in found and "vllm serve" in found and "distprune export" in found
    record = prune_here(tmp_path / "less", method="curvature", sparsity=0.8, distill=False)
    assert any(layer.pruned.attention is None for layer in record.layers)
    found = card(tmp_path / "less").text
    assert "With vLLM: not at all, since a layer has no attention." in found and "vllm serve" not in found
