"""The tasks of a worker, run by hand: against transformers' own forward pass, and against what a run writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distprune import InputError
from distprune.budgets import Target
from distprune.calibration import open_calibration
from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.engine import load_record
from distprune.engine.run.preflight import dense_model
from distprune.engine.worker.check_tasks import CheckLayer, CheckOuter, ProveLayer
from distprune.engine.worker.distill_task import Distill
from distprune.engine.worker.layer_worker import ForgottenError, LayerWorker
from distprune.engine.worker.pass_tasks import (
    Advance,
    Backward,
    CloseLayer,
    CloseLoss,
    Embed,
    LossGradient,
    OpenBackward,
    OpenForward,
    OpenLoss,
    Sweep,
)
from distprune.engine.worker.prune_task import Prune
from distprune.layers import names
from distprune.layers.sites import NEURONS
from distprune.methods import Profile
from distprune.methods.llm_pruner import LLMPruner
from distprune.statistics import Mean

LAYERS = 4


@pytest.fixture
def tokens(calibration_path) -> Tensor:
    return torch.from_numpy(open_calibration(calibration_path).tokens.astype("int32"))


@pytest.fixture
def make_worker():
    def make(path, **options) -> LayerWorker:
        defaults = {"model": str(path), "output": "unused", "method": "olica", "micro_batch": 3, "dtype": "float32"}
        config = PruneConfig(**defaults | options)
        return LayerWorker(config, dense_model(Checkpoint.open(path)), torch.device("cpu"))

    return make


def dense_layer(worker: LayerWorker, index: int, hidden_states: Tensor) -> tuple[Tensor, Profile]:
    """Output and profile of a layer that gets its input in one piece."""
    OpenForward(index).run(worker)
    return Sweep(index, 0, hidden_states).run(worker), CloseLayer(index, 1).run(worker)[0]


def test_an_open_layer_that_was_forgotten_is_not_gone_on_with(make_worker, tokens, dense_path):
    worker, other = make_worker(dense_path), make_worker(dense_path)
    OpenForward(0).run(worker)
    states = Embed(tokens).run(worker)
    Sweep(0, 0, states).run(worker)
    for task, at in ((Sweep(0, 1, states), other), (Sweep(0, 2, states), worker), (CloseLayer(1, 1), worker)):
        with pytest.raises(ForgottenError):
            task.run(at)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 32}),
        ("gemma3_text", {"sliding_window": 5}),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32}),
        ("gpt_neox", {}),
    ],
)
@torch.no_grad()
def test_the_dense_pass_gives_the_hidden_states_of_transformers(save_model, make_worker, tokens, model_type, changes):
    path = save_model(model_type, **changes)
    worker, model = make_worker(path), AutoModelForCausalLM.from_pretrained(path).eval()
    expected = model(tokens.long(), output_hidden_states=True).hidden_states

    hidden_states = Embed(tokens).run(worker)
    torch.testing.assert_close(hidden_states, expected[0], rtol=0, atol=0)
    for index in range(LAYERS):
        hidden_states, _ = dense_layer(worker, index, hidden_states)
        if index + 1 < LAYERS:
            torch.testing.assert_close(hidden_states, expected[index + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_pass_gives_the_gradients_of_transformers(save_model, make_worker, tokens, dtype, tied):
    path = save_model("qwen3", tie_word_embeddings=tied)
    worker = make_worker(path, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]) or given[0].retain_grad())
    logits = model(tokens.long()).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().long(), reduction="sum")
    loss.backward()

    states = [Embed(tokens).run(worker)]
    for index in range(LAYERS):
        states.append(Advance(index, states[-1]).run(worker))
    OpenLoss().run(worker)
    gradient = LossGradient(states[-1], tokens).run(worker)
    assert CloseLoss().run(worker).sum().item() == pytest.approx(loss.item(), rel=1e-4)
    assert worker.runner.shell.model.get_output_embeddings().weight.is_meta  # its memory is free again
    for index in reversed(range(LAYERS)):
        OpenBackward(index).run(worker)
        gradient = Backward(index, 0, states[index], gradient).run(worker)
        wanted = inputs[index].grad
        assert (gradient - wanted).norm() <= (1e-5 if dtype == "float32" else 2e-2) * wanted.norm()
    # The shell's tensors are in the dtype of forward passes again.
    assert torch.equal(Embed(tokens).run(worker), states[0])


@pytest.mark.parametrize("propagation", [1, 2, "full"])
def test_a_run_prunes_each_layer_on_the_outputs_that_propagation_says(
    run, make_worker, tokens, dense_path, propagation
):
    folder, _ = run(sparsity=0.3, propagation=propagation)
    written = Checkpoint.open(folder)

    worker = make_worker(dense_path)
    dense, profiles = [Embed(tokens).run(worker)], []
    for index in range(LAYERS):
        output, profile = dense_layer(worker, index, dense[-1])
        dense.append(output)
        profiles.append(profile)
    plan = worker.method.plan(Target(worker.architecture, 0.3), profiles, align=8)

    block = LAYERS if propagation == "full" else propagation
    for index in range(LAYERS):
        hidden_states = dense[index] if index % block == 0 else output
        finished, output, _ = Prune(index, hidden_states, plan[index], profiles[index], {}, True).run(worker)
        for name, tensor in finished.written.items():
            assert torch.equal(written.read([name])[name], tensor), name


@pytest.mark.parametrize("method", ["olica", "flap", "wanda-sp"])
def test_a_layer_that_begins_a_block_is_pruned_on_what_the_dense_pass_has_seen(
    make_worker, tokens, dense_path, method, monkeypatch
):
    worker = make_worker(dense_path, method=method, propagation=2)
    first = Embed(tokens).run(worker)
    OpenForward(0).run(worker)
    second = Sweep(0, 0, first).run(worker)
    profile, carried = CloseLayer(0, 1).run(worker)
    plan = worker.method.plan(Target(worker.architecture, 0.3), [profile] * LAYERS, align=8)
    # The last layer's shape, which asks for no second look.
    expected, _, _ = Prune(0, first, plan[-1], profile, {}, False).run(worker)
    monkeypatch.setattr(worker.runner, "observe", None)
    found, _, _ = Prune(0, first, plan[-1], profile, carried, False).run(worker)
    for name, tensor in expected.written.items():
        assert torch.equal(found.written[name], tensor), name

    OpenForward(1).run(worker)
    Sweep(1, 0, second).run(worker)
    assert not CloseLayer(1, 1).run(worker)[1]


def test_moments_are_carried_from_the_dense_pass_where_a_gradient_pass_follows(
    make_worker, tokens, dense_path, monkeypatch
):
    monkeypatch.setattr(LLMPruner, "carried_moments", lambda self, shape: [Mean(NEURONS)])
    worker = make_worker(dense_path, method="llm-pruner")
    states = Embed(tokens).run(worker)
    OpenForward(0).run(worker)
    output = Sweep(0, 0, states).run(worker)
    profile, carried = CloseLayer(0, 1).run(worker)
    assert not profile
    assert tokens.numel() in [int(tensor) for tensor in carried.values() if tensor.dim() == 0] and len(carried) == 2

    OpenBackward(0).run(worker)
    Backward(0, 0, states, torch.ones_like(output)).run(worker)
    profile, carried = CloseLayer(0, 1).run(worker)
    assert set(profile) == {"groups", "neurons"} and not carried


@pytest.mark.parametrize("look_ahead", [0, 1, 2])
def test_a_run_distils_each_layer_on_the_dense_models_hidden_states(run, make_worker, tokens, dense_path, look_ahead):
    options = {"distill": {"learning_rate": 1e-3, "epochs": 2, "batch": 2, "look_ahead": look_ahead}}
    plain, distilled = (run(sparsity=0.3, **more) for more in ({}, options))
    pruned, written = Checkpoint.open(plain[0]), Checkpoint.open(distilled[0])
    reports = [layer.distillation for layer in load_record(distilled[0]).layers]
    assert any(report.kept for report in reports)

    worker = make_worker(dense_path, **options)
    states = [Embed(tokens).run(worker)]
    for index in range(LAYERS):
        states.append(Advance(index, states[-1]).run(worker))
    for index, report in enumerate(reports):
        shape = plain[1].layers[index].pruned
        tensors = pruned.read(worker.model.stored_dims(index, shape))
        layer = worker.model.from_disk(index, tensors, shape, None)
        ahead = states[min(index + 1 + look_ahead, LAYERS)]
        finished, found = Distill(index, layer, states[index], states[index + 1], ahead).run(worker)
        assert found == report
        for name, tensor in finished.written.items():
            assert torch.equal(written.read([name])[name], tensor), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named_with_their_file(save_model, make_worker, value):
    path = save_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5, 3] = value
        model.lm_head.weight[0, 0] = value
    model.save_pretrained(path)
    worker = make_worker(path)
    CheckLayer(1).run(worker)
    with pytest.raises(
        InputError, match=r"model\.safetensors: tensor model\.layers\.2\.mlp\.up_proj\.weight holds NaN"
    ):
        CheckLayer(2).run(worker)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor lm_head\.weight holds NaN"):
        CheckOuter().run(worker)


def test_a_family_whose_layers_are_not_understood_is_named(make_worker, dense_path, monkeypatch):
    worker = make_worker(dense_path)
    for index in range(LAYERS):
        ProveLayer(index).run(worker)
    split = names.LayerNames._attention

    def mistaken(self, state, shape, pairs):
        """Takes the key projection for the value's."""
        attention = split(self, state, shape, pairs)
        return type(attention)(**vars(attention) | {"key": attention.value, "value": attention.key})

    monkeypatch.setattr(names.LayerNames, "_attention", mistaken)
    with pytest.raises(InputError, match=r"model_type 'llama': layer 2, rebuilt from the parts.*docs/families\.md"):
        ProveLayer(2).run(worker)


def test_activations_beyond_the_dtype_are_refused_with_the_layer(save_model, make_worker, tokens):
    path = save_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e5
    model.save_pretrained(path)
    worker = make_worker(path, dtype="float16")
    hidden_states, _ = dense_layer(worker, 0, Embed(tokens).run(worker))
    with pytest.raises(InputError, match=r"layer 1: its hidden states overflow in float16.*--dtype"):
        dense_layer(worker, 1, hidden_states)
