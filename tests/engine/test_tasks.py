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
from distprune.decoder_layer import state_of
from distprune.distillation.layerwise import Batch
from distprune.engine import load_record
from distprune.engine.worker.layer_worker import ForgottenError, LayerTasks
from distprune.engine.worker.weights import Model
from distprune.families import family_of
from distprune.methods import Profile
from distprune.methods.llm_pruner import LLMPruner
from distprune.statistics import Mean

LAYERS = 4


@pytest.fixture
def tokens(calibration_path):
    return open_calibration(calibration_path).tokens


@pytest.fixture
def make_tasks():
    def make(path, **options) -> LayerTasks:
        checkpoint = Checkpoint.open(path)
        family = family_of(checkpoint.config)
        model = Model(family, family.dense_config(checkpoint.config), checkpoint)
        defaults = {"model": str(path), "output": "unused", "method": "olica", "micro_batch": 3, "dtype": "float32"}
        config = PruneConfig(**defaults | options)
        return LayerTasks(config, model, torch.device("cpu"))

    return make


def dense_layer(tasks: LayerTasks, index: int, hidden_states: Tensor) -> tuple[Tensor, Profile]:
    """Output and profile of a layer that gets its input in one piece."""
    tasks.open_layer(index)
    return tasks.sweep(index, 0, hidden_states), tasks.profile(index, 1)[0]


def test_an_open_layer_that_was_forgotten_is_not_gone_on_with(make_tasks, tokens, dense_path):
    tasks, others = make_tasks(dense_path), make_tasks(dense_path)
    tasks.open_layer(0)
    states = tasks.embed(tokens)
    tasks.sweep(0, 0, states)
    for go_on in (lambda: others.sweep(0, 1, states), lambda: tasks.sweep(0, 2, states), lambda: tasks.profile(1, 1)):
        with pytest.raises(ForgottenError):
            go_on()


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 32}),
    ],
)
@torch.no_grad()
def test_the_dense_pass_gives_the_hidden_states_of_transformers(save_model, make_tasks, tokens, model_type, changes):
    path = save_model(model_type, **changes)
    tasks, model = make_tasks(path), AutoModelForCausalLM.from_pretrained(path).eval()
    expected = model(torch.from_numpy(tokens.astype("int64")), output_hidden_states=True).hidden_states

    hidden_states = tasks.embed(tokens)
    torch.testing.assert_close(hidden_states, expected[0], rtol=0, atol=0)
    for index in range(LAYERS):
        hidden_states, _ = dense_layer(tasks, index, hidden_states)
        if index + 1 < LAYERS:
            torch.testing.assert_close(hidden_states, expected[index + 1], rtol=1e-5, atol=1e-5)
    # transformers gives the last hidden states after the final norm.
    torch.testing.assert_close(model.model.norm(hidden_states), expected[LAYERS], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("propagation", [1, 2, "full"])
def test_a_run_prunes_each_layer_on_the_outputs_that_propagation_says(run, make_tasks, tokens, dense_path, propagation):
    folder, _ = run(sparsity=0.3, propagation=propagation)
    written = Checkpoint.open(folder)

    tasks = make_tasks(dense_path)
    dense, profiles = [tasks.embed(tokens)], []
    for index in range(LAYERS):
        output, profile = dense_layer(tasks, index, dense[-1])
        dense.append(output)
        profiles.append(profile)
    plan = tasks.method.plan(Target(tasks.dense, 0.3), profiles, align=8)

    block = LAYERS if propagation == "full" else propagation
    for index in range(LAYERS):
        hidden_states = dense[index] if index % block == 0 else result.output  # noqa: F821
        result = tasks.prune(index, hidden_states, plan[index], profiles[index], {}, propagate=True)
        for name, tensor in tasks.family.layer_to_checkpoint(result.layer, index).items():
            assert torch.equal(written.read([name])[name], tensor), name


@pytest.mark.parametrize("method", ["olica", "flap", "wanda-sp"])
def test_a_layer_that_begins_a_block_is_pruned_on_what_the_dense_pass_has_seen(
    make_tasks, tokens, dense_path, method, monkeypatch
):
    tasks = make_tasks(dense_path, method=method, propagation=2)
    first = tasks.embed(tokens)
    tasks.open_layer(0)
    second = tasks.sweep(0, 0, first)
    profile, carried = tasks.profile(0, 1)
    plan = tasks.method.plan(Target(tasks.dense, 0.3), [profile] * LAYERS, align=8)
    # The last layer's shape, which asks for no second look.
    expected = tasks.prune(0, first, plan[-1], profile, {}, propagate=False)
    monkeypatch.setattr(tasks.runner, "observe", None)
    found = tasks.prune(0, first, plan[-1], profile, carried, propagate=False)
    for name, tensor in state_of(expected.layer).items():
        assert torch.equal(state_of(found.layer)[name], tensor), name

    tasks.open_layer(1)
    tasks.sweep(1, 0, second)
    assert not tasks.profile(1, 1)[1]


def test_moments_are_carried_from_the_dense_pass_where_a_gradient_pass_follows(
    make_tasks, tokens, dense_path, monkeypatch
):
    monkeypatch.setattr(LLMPruner, "carried_moments", lambda self, shape: [Mean("ffn_neurons")])
    tasks = make_tasks(dense_path, method="llm-pruner")
    states = tasks.embed(tokens)
    tasks.open_layer(0)
    output = tasks.sweep(0, 0, states)
    profile, carried = tasks.profile(0, 1)
    assert not profile
    assert carried["tokens"] == tokens.size and len(carried) == 2

    tasks.open_backward(0)
    tasks.backward(0, 0, states, torch.ones_like(output))
    profile, carried = tasks.profile(0, 1)
    assert set(profile) == {"groups", "neurons"} and not carried


@pytest.mark.parametrize("look_ahead", [0, 1, 2])
def test_a_run_distils_each_layer_on_the_dense_models_hidden_states(run, make_tasks, tokens, dense_path, look_ahead):
    options = {"distill": {"learning_rate": 1e-3, "epochs": 2, "batch": 2, "look_ahead": look_ahead}}
    pruned, distilled = (Checkpoint.open(run(sparsity=0.3, **more)[0]) for more in ({}, options))
    lessons = [layer.distillation for layer in load_record(distilled.path).layers]
    assert any(lesson.kept for lesson in lessons)

    tasks = make_tasks(dense_path, **options)
    states = [tasks.embed(tokens)]
    for index in range(LAYERS):
        states.append(tasks.advance(index, states[-1]))
    for index, lesson in enumerate(lessons):
        shapes = tasks.family.layer_shapes(pruned.config, index)
        layer = tasks.family.layer_from_checkpoint(pruned.read(shapes), pruned.config, index)
        exercise = Batch(states[index], states[index + 1], states[min(index + 1 + look_ahead, LAYERS)])
        learnt, found = tasks.distill(index, layer, exercise)
        assert found == lesson
        for name, tensor in tasks.family.layer_to_checkpoint(learnt, index).items():
            assert torch.equal(distilled.read([name])[name], tensor), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named_with_their_file(save_model, make_tasks, value):
    path = save_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[5, 3] = value
        model.lm_head.weight[0, 0] = value
    model.save_pretrained(path)
    tasks = make_tasks(path)
    tasks.check_layer(1)
    with pytest.raises(
        InputError, match=r"model\.safetensors: tensor model\.layers\.2\.mlp\.up_proj\.weight holds NaN"
    ):
        tasks.check_layer(2)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor lm_head\.weight holds NaN"):
        tasks.check_outer()


def test_activations_beyond_the_dtype_are_refused_with_the_layer(save_model, make_tasks, tokens):
    path = save_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e5
    model.save_pretrained(path)
    tasks = make_tasks(path, dtype="float16")
    hidden_states, _ = dense_layer(tasks, 0, tasks.embed(tokens))
    with pytest.raises(InputError, match=r"layer 1: its hidden states overflow in float16.*--dtype"):
        dense_layer(tasks, 1, hidden_states)
