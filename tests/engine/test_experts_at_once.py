"""Runs whose workers hold some of a mixture's experts at a time."""

from __future__ import annotations

import pytest
import torch
from large_mixture import Took, replay
from safetensors.torch import load_file
from tiny_families import EXPERTS
from transformers import AutoModelForCausalLM

from distprune import load
from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.engine.run.record import LOG_FILE
from distprune.engine.worker.dense_model import DenseModel
from distprune.errors import InputError
from distprune.methods import METHODS
from distprune.planning import Cluster
from distprune.planning.memory import task_peaks
from distprune.planning.scenario import make_scenario

#: One that stores experts one by one and has groups, shared experts and a dense layer; one that stores them together.
FAMILIES = ["deepseek_v3", "gpt_oss"]
OPTIONS = {"method": "curvature", "sparsity": 0.3, "distill": None, "propagation": "full"}


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def read_at_once(monkeypatch) -> list[int]:
    """How many experts each reading of some was of; none of a whole layer's is allowed."""
    counts, read = [], DenseModel.read_chosen

    def noted(self, index, numbers):
        counts.append(len(numbers))
        return read(self, index, numbers)

    monkeypatch.setattr(DenseModel, "read_chosen", noted)
    return counts


@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if method.takes_chunks))
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_run_in_chunks_prunes_as_one_with_whole_layers(
    model_type, method, save_mixture, prune_here, read_at_once, tmp_path
):
    model, options = save_mixture(model_type), OPTIONS | {"method": method}
    whole = prune_here(tmp_path / "whole", model, **options)
    assert not read_at_once
    chunked = prune_here(tmp_path / "chunked", model, **options, experts_at_once=5)
    assert max(read_at_once) == 5
    assert [layer.pruned for layer in chunked.layers] == [layer.pruned for layer in whole.layers]
    before, after = stored(tmp_path / "whole"), stored(tmp_path / "chunked")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    ids = torch.arange(3, 15)[None]
    for opened in (
        load(tmp_path / "chunked"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "chunked", trust_remote_code=True),
    ):
        assert opened(ids).logits.isfinite().all()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_at_sparsity_0_every_tensor_is_as_it_was(model_type, save_mixture, prune_here, read_at_once, tmp_path):
    model = save_mixture(model_type)
    prune_here(tmp_path / "pruned", model, **OPTIONS | {"sparsity": 0}, experts_at_once=EXPERTS // 2)
    assert max(read_at_once) == EXPERTS // 2
    before, after = stored(model), stored(tmp_path / "pruned")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "flap"}, "--experts-at-once 2: method flap needs all experts .* methods curvature"),
        ({"distill": {"batch": 2}}, "--experts-at-once 2: distillation needs all experts"),
    ],
)
def test_what_needs_whole_layers_is_refused(save_mixture, prune_here, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        prune_here(tmp_path / "pruned", save_mixture("mixtral"), **OPTIONS | changes, experts_at_once=2)
    assert not (tmp_path / "pruned").exists()


def test_a_model_without_experts_is_refused(prune_here, tmp_path):
    with pytest.raises(
        InputError, match="--experts-at-once 2: distprune knows no mixture of experts in this llama model"
    ):
        prune_here(tmp_path / "pruned", **OPTIONS, experts_at_once=2)


def test_the_script_for_large_mixtures_replays_what_the_log_tells(save_mixture, prune_here, tmp_path):
    output = tmp_path / "pruned"
    prune_here(
        output, save_mixture("mixtral", num_hidden_layers=1), **OPTIONS | {"method": "wanda-sp"}, experts_at_once=2
    )
    took = Took.of(output / LOG_FILE)
    assert took.around > 0 and len(took.experts) == -(-EXPERTS // 2) and min(took.experts) > 0
    (one, experts_of_one), (three, experts_of_three) = replay(took, 1), replay(took, 3)
    assert experts_of_one == pytest.approx(sum(took.experts), rel=0.01)
    assert max(took.experts) <= experts_of_three < experts_of_one and three < one


@pytest.mark.slow
@pytest.mark.parametrize("method", ["curvature", "wanda-sp"])
def test_a_plan_says_that_workers_need_less(method, save_mixture, calibrate):
    model = save_mixture("mixtral", hidden_size=128, intermediate_size=256, head_dim=8, num_hidden_layers=2)

    def most(experts_at_once: int | None) -> float:
        config = PruneConfig(
            model=str(model),
            output=model / "pruned",
            method=method,
            sparsity=0.3,
            calibration=calibrate(model),
            experts_at_once=experts_at_once,
            dtype="float32",
        )
        scenario = make_scenario(config, Checkpoint.open(model), Cluster(), "cpu", {})
        peaks = task_peaks(scenario)
        return max(peaks[kind].host for kind in peaks if kind not in ("check_layer", "check_kind"))

    assert most(1) < most(4) < most(None)


def test_a_plan_knows_chunks_on_a_gpu(save_mixture, calibrate):
    """Whatever chooses a chunk lies where the layer does."""
    model = save_mixture("mixtral")
    config = PruneConfig(
        model=str(model),
        output=model / "pruned",
        method="wanda-sp",
        calibration=calibrate(model),
        experts_at_once=2,
        dtype="bfloat16",
    )
    scenario = make_scenario(config, Checkpoint.open(model), Cluster(gpus=1), "h100", {})
    peaks = task_peaks(scenario)
    assert peaks["prune_around"].device > 0 and peaks["prune_experts"].device > 0
