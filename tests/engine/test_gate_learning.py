"""Gates that learn in whole runs: what transformers' model learns by hand, by any workers, after interruptions."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interruptions import Stops
from transformers import AutoModelForCausalLM

from distprune.calibration import open_calibration
from distprune.checkpoint import partial_directory
from distprune.engine.run.journal import Journal, entry_of
from distprune.engine.run.states import DENSE
from distprune.engine.stages import gate_learning
from distprune.engine.stages.gate_learning import GATES

LEARNING = {"steps": 4, "batch": 4, "rate": 0.5, "ramp": 0.5}
OPTIONS = {"method": "flop", "sparsity": 0.3, "propagation": 2, "options": LEARNING}
LAYERS = 4


@pytest.fixture(scope="module")
def by_one_worker(run, digests) -> dict[str, str]:
    return digests(run(**OPTIONS)[0])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Adam:
    """Kingma & Ba, ICLR 2015, algorithm 1."""

    def __init__(self, rate):
        self.rate, self.count, self.first, self.second = rate, 0, 0.0, 0.0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        deviation = np.sqrt(self.second / (1 - 0.999**self.count))
        return self.rate * self.first / (1 - 0.9**self.count) / (deviation + 1e-8)


def by_hand(model, tokens: torch.Tensor, sparsity: float) -> np.ndarray:
    """log α of the neurons' gates of all layers, (layers, f), learnt by the whole model's own backward pass."""
    layers = model.model.layers
    size = sum(parameter.numel() for parameter in layers.parameters())
    share = 3 * model.config.hidden_size / size
    log_alpha = np.full((len(layers), model.config.intermediate_size), np.log(9.0))
    multipliers, of_multipliers, gates = np.zeros(2), Adam(np.array([1, 10]) * 0.5), [None] * len(layers)
    of_gates = Adam(LEARNING["rate"])

    def hook(index):
        return lambda _, given: None if gates[index] is None else (given[0] * gates[index],)

    for index, layer in enumerate(layers):
        layer.mlp.down_proj.register_forward_pre_hook(hook(index))
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).split(LEARNING["batch"])
    order += torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1)).split(LEARNING["batch"])
    for step in range(LEARNING["steps"]):
        batch = tokens[order[step]]
        gates[:] = [None] * len(layers)
        with torch.no_grad():
            wanted = model(batch).logits.log_softmax(-1)
        uniform = torch.rand(log_alpha.size, generator=torch.Generator().manual_seed(step), dtype=torch.float64).numpy()
        uniform = uniform.reshape(log_alpha.shape)
        soft = sigmoid(np.log(uniform) - np.log(1 - uniform) + log_alpha)
        z = np.clip(1.2 * soft - 0.1, 0, 1)
        gates[:] = [torch.tensor(own, dtype=torch.float32).requires_grad_() for own in z]
        F.kl_div(model(batch).logits.log_softmax(-1), wanted, log_target=True, reduction="sum").backward()
        in_gates = np.stack([own.grad.double().numpy() for own in gates]) / batch.numel()
        opened = sigmoid(log_alpha + np.log(11.0))
        excess = 1 - share * (1 - opened).sum() - (1 - sparsity * min(1, (step + 1) / (LEARNING["steps"] / 2)))
        gradient = in_gates * np.where((z > 0) & (z < 1), 1.2 * soft * (1 - soft), 0)
        gradient += (multipliers[0] + 2 * multipliers[1] * excess) * share * opened * (1 - opened)
        log_alpha = log_alpha - of_gates.step(gradient)
        multipliers = multipliers + of_multipliers.step(np.array([excess, excess**2]))
    return log_alpha


def test_gates_learn_what_the_whole_model_teaches_them_by_hand(run, dense_path, calibration_path, tmp_path):
    """In the layout heterogeneous there are gates of neurons alone."""
    output = tmp_path / "pruned"
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops("Pruning", 0), workers=2, layout="heterogeneous", **OPTIONS)
    learnt = Journal(partial_directory(output) / "journal").tensors(entry_of(GATES, LEARNING["steps"]))
    model = AutoModelForCausalLM.from_pretrained(dense_path, dtype=torch.float32)
    tokens = torch.from_numpy(open_calibration(calibration_path).tokens.astype("int64"))
    expected = by_hand(model, tokens, OPTIONS["sparsity"])
    found = learnt["log_alpha"].numpy().reshape(expected.shape)
    moved = np.abs(expected - np.log(9.0)).max()
    assert moved > 0.5
    # Adam's first steps are of one size whatever the gradient, so one near zero may go either way.
    assert np.quantile(np.abs(found - expected), 0.99) < 0.01 * moved


def test_the_journal_keeps_the_dense_models_end_until_the_gates_have_learnt(run, tmp_path):
    output = tmp_path / "pruned"
    journal = Journal(partial_directory(output) / "journal")
    for stage, is_kept in (("Learning gates", True), ("Pruning", False)):
        with pytest.raises(KeyboardInterrupt):
            run(output=output, progress=Stops(stage, 0), **OPTIONS)
        assert journal.has(entry_of(DENSE, LAYERS)) == is_kept


def test_where_nothing_is_to_go_no_gates_learn(run, calls):
    _, record = run(**OPTIONS | {"sparsity": 0.0})
    assert "gates" not in record.seconds and record.decoder_sparsity == 0
    assert "open_gated" not in {kind for kind, _ in calls}


def test_a_run_tells_what_its_gates_have_come_to(run):
    listening = Stops("never", 0)
    run(progress=listening, **OPTIONS)
    [told] = [text for text in listening.notes if "gates" in text]
    assert re.search(
        r"After 4 steps the gates are expected to keep \d+\.\d% of the decoder layers; .* diverge by", told
    )


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(by_one_worker, run, calls, digests, workers):
    folder, record = run(workers=workers, **OPTIONS)
    assert digests(folder) == by_one_worker
    assert len({worker for kind, worker in calls if kind == "close_gated"}) == workers
    assert {"dense pass", "gates", "prune"} < set(record.seconds)


@pytest.mark.parametrize(
    ("stage", "steps", "repeated"), [("Learning gates", 0, 4), ("Learning gates", 3, 2), ("Pruning", 0, 0)]
)
def test_an_interrupted_run_goes_on_from_the_last_steps_that_were_kept(
    by_one_worker, run, calls, digests, monkeypatch, tmp_path, stage, steps, repeated
):
    monkeypatch.setattr(gate_learning, "KEPT_EVERY", 2)
    output = tmp_path / "pruned"
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops(stage, steps), **OPTIONS)
    calls.clear()
    assert digests(run(output=output, workers=2, **OPTIONS)[0]) == by_one_worker
    kinds = [kind for kind, _ in calls]
    assert kinds.count("close_gated") == LAYERS * repeated
