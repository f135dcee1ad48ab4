"""End-to-end distillation in whole runs: what transformers' models learn by hand, by any workers, after crashes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from interruptions import Stops, first_time_of
from transformers import AutoModelForCausalLM

from distprune import load
from distprune.calibration import open_calibration
from distprune.config import DistillConfig
from distprune.distillation.layerwise import split
from distprune.engine import load_record
from distprune.engine.stages import end_to_end

LOGITS = {"objective": "logits", "learning_rate": 1e-2, "epochs": 2, "batch": 4, "held_out": 0.25}
OPTIONS = {"method": "olica", "sparsity": 0.3, "propagation": 2, "distill": LOGITS}


@pytest.fixture(scope="module")
def by_one_worker(run):
    return run(**OPTIONS)[0]


def by_hand(dense, pruned, tokens: torch.Tensor, options: DistillConfig) -> dict[str, list[float] | float]:
    """Trains the pruned model's layers. Updates of rank r are W + BA, with A as it begins in our layers."""
    pruned.requires_grad_(False)
    updates = {}
    for layer in pruned.model.layers:
        generator = torch.Generator().manual_seed(options.seed)
        for linear in [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]:
            if options.train == "full":
                continue
            out, inputs = linear.weight.shape
            rank = min(options.rank, out, inputs)
            right = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            updates[linear] = linear.weight.clone(), torch.zeros(out, rank).requires_grad_(), right.requires_grad_()
        layer.requires_grad_(options.train == "full")
    trained = [factor for _, *factors in updates.values() for factor in factors]
    trained += [parameter for parameter in pruned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)

    def divergence(batch: torch.Tensor) -> torch.Tensor:
        for linear, (weight, left, right) in updates.items():
            del linear._parameters["weight"]
            linear.weight = weight + left @ right
        wanted, found = (model(batch).logits.log_softmax(-1) for model in (dense, pruned))
        for linear in updates:
            linear._parameters["weight"] = torch.nn.Parameter(linear.__dict__.pop("weight").detach(), False)
        return F.kl_div(found, wanted, log_target=True, reduction="sum")

    training, held_out = split(len(tokens), options)
    told = {"before": divergence(tokens[held_out]).item() / tokens[held_out].numel(), "training": []}
    generator, step = torch.Generator().manual_seed(options.seed), 0
    steps = options.epochs * math.ceil(len(training) / options.batch)
    for _ in range(options.epochs):
        for batch in torch.randperm(len(training), generator=generator).split(options.batch):
            factor = min(1, (step + 1) / max(1, steps // 20)) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = options.learning_rate * factor
            optimizer.zero_grad()
            loss = divergence(tokens[training[batch]])
            loss.backward()
            optimizer.step()
            step += 1
            told["training"].append(loss.item() / tokens[training[batch]].numel())
    return told | {"after": divergence(tokens[held_out]).item() / tokens[held_out].numel()}


@pytest.mark.parametrize("train", ["lora", "full"])
def test_all_layers_learn_together_what_transformers_models_learn_by_hand(run, dense_path, calibration_path, train):
    options = LOGITS | {"train": train, "learning_rate": 1e-2 if train == "lora" else 1e-3}
    found = load(folder := run(**OPTIONS | {"distill": options})[0], dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(dense_path, dtype=torch.float32)
    undistilled = run(**OPTIONS | {"distill": None})[0]
    pruned = load(undistilled, dtype=torch.float32)
    tokens = torch.from_numpy(open_calibration(calibration_path).tokens.astype("int64"))
    told = by_hand(dense, pruned, tokens, DistillConfig(**options))

    reports = [layer.distillation for layer in load_record(folder).layers]
    assert all(report == reports[0] for report in reports) and reports[0].kept
    assert told["after"] < told["before"]
    assert reports[0].held_out_before == pytest.approx(told["before"], rel=1e-3)
    assert reports[0].held_out_after == pytest.approx(told["after"], rel=1e-2)
    assert reports[0].training == pytest.approx(told["training"], rel=1e-2)
    start = load(undistilled, dtype=torch.float32).state_dict()
    for name, tensor in pruned.state_dict().items():
        moved = (tensor - start[name]).norm()
        assert (found.state_dict()[name] - tensor).norm() <= 0.05 * moved + 1e-6, name


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(by_one_worker, run, calls, digests, workers):
    folder, _ = run(workers=workers, **OPTIONS)
    assert digests(folder) == digests(by_one_worker)
    assert len({worker for kind, worker in calls if kind == "learn"}) == workers


@pytest.mark.slow
def test_losing_workers_gives_the_same_bytes(by_one_worker, run, lose, digests):
    lost = lose(first_time_of({("learn", 3), ("step_optimizer", 0)}))
    folder, _ = run(workers=2, **OPTIONS)
    assert [call.losses for call in lost] == [1, 1]
    assert digests(folder) == digests(by_one_worker)


@pytest.mark.parametrize(("steps", "repeated"), [(0, 4), (3, 2), (4, 0)])
def test_an_interrupted_run_goes_on_from_the_last_steps_that_were_kept(
    by_one_worker, run, calls, digests, monkeypatch, tmp_path, steps, repeated
):
    monkeypatch.setattr(end_to_end, "KEPT_EVERY", 2)
    output = tmp_path / "pruned"
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops("Distilling", steps), **OPTIONS)
    calls.clear()
    assert digests(run(output=output, **OPTIONS)[0]) == digests(by_one_worker)
    kinds = [kind for kind, _ in calls]
    assert "prune" not in kinds
    assert kinds.count("step_optimizer") == 4 * repeated


def test_what_does_not_help_is_not_kept(run, by_one_worker, digests):
    folder, record = run(**OPTIONS | {"distill": LOGITS | {"train": "full", "learning_rate": 10.0}})
    plain, _ = run(**OPTIONS | {"distill": None})
    assert not any(layer.distillation.kept for layer in record.layers)
    weights = [{name: d for name, d in digests(made).items() if "safetensors" in name} for made in (folder, plain)]
    assert weights[0] == weights[1]


def test_the_objective_has_defaults_of_its_own():
    layers, logits = DistillConfig(), DistillConfig(objective="logits")
    assert (layers.train, logits.train) == ("full", "lora")
    assert DistillConfig(objective="logits", train="full", batch=2).batch == 2
