"""Methods that narrow a feed-forward network narrow every expert by what was seen of it alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mixture_layers import EXPERTS, MIXTURES, WIDTH, change_each, eager_experts, kept_rows, routed

from distprune.layers.parts import Experts, FeedForward
from distprune.layers.runner import LayerRunner
from distprune.layers.shapes import ExpertsShape
from distprune.methods import METHODS
from distprune.methods.mixtures import with_each
from distprune.methods.units import keep_neurons

KEPT = 20
#: Those that move no weight of what stays, and those that do.
CHOOSING = ("flap", "heapr", "llm-pruner", "magnitude", "mini-llm", "olica", "wanda-sp", "z-pruner")
REFITTING = ("oops", "slimgpt")
pytestmark = pytest.mark.filterwarnings("ignore::distprune.errors.ConvergenceWarning")


@pytest.fixture(params=MIXTURES)
def mixture(request, subject):
    return subject(request.param, **MIXTURES[request.param])


def narrowed(this):
    return this.layer.shape.with_ffn(width=KEPT)


def unused(this, expert: int = 3):
    """The same layer, to one of whose experts no token is routed, however the hidden states are."""
    hidden_states = this.hidden_states.clone()
    hidden_states[..., 0] = 40.0
    row = torch.zeros_like(this.ffn.router.weight[expert])
    row[0] = -100 * this.layer.rest["post_attention_layernorm.weight"][0].sign()
    weight = this.ffn.router.weight.index_copy(0, torch.tensor([expert]), row[None])
    ffn = replace(this.ffn, router=replace(this.ffn.router, weight=weight))
    changed = replace(this.changed(ffn=ffn), hidden_states=hidden_states)
    assert not len(routed(changed.model, changed.layer, hidden_states).to(expert)[0])
    return changed


def neurons_of(this, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert's neurons are, (tokens, f), by the module with all experts as its family's code says."""
    with eager_experts(this.model, this.layer) as experts, torch.no_grad():
        bias = getattr(experts, "gate_up_proj_bias", torch.zeros(EXPERTS, 1))[expert]
        weight = experts.gate_up_proj[expert]
        return experts._apply_gate(x @ (weight if experts.is_transposed else weight.T) + bias)


def kept_by_each(dense: Experts, pruned: Experts) -> list[torch.Tensor]:
    return [kept_rows(dense.inputs[number, -1], pruned.inputs[number, -1]) for number in range(dense.shape.count)]


@pytest.mark.parametrize("name", CHOOSING)
def test_a_narrowed_mixture_is_the_dense_one_with_zeros_for_what_went(mixture, name):
    pruned = mixture.prune(METHODS[name](), narrowed(mixture))
    dense, kept = mixture.ffn, kept_by_each(mixture.ffn, pruned.ffn)
    assert len({tuple(each.tolist()) for each in kept}) > 1  # each expert keeps its own

    def zeroed(number: int, down: torch.Tensor) -> torch.Tensor:
        return down * torch.zeros(WIDTH).index_fill(0, kept[number], 1.0)

    silenced = replace(dense, down=change_each(dense, zeroed))
    if dense.shared_count:
        neurons = kept_rows(dense.shared.up.weight, pruned.ffn.shared.up.weight)
        assert len(neurons) == dense.shared_count * KEPT
        mask = torch.zeros(len(dense.shared.up.weight)).index_fill(0, neurons, 1.0)
        down = replace(dense.shared.down, weight=dense.shared.down.weight * mask)
        silenced = replace(silenced, shared=replace(dense.shared, down=down))
    elif dense.shared:
        assert torch.equal(pruned.ffn.shared.up.weight, dense.shared.up.weight)
    torch.testing.assert_close(mixture.run(pruned), mixture.run_with(ffn=silenced), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_wanda_keeps_the_neurons_of_each_expert_that_its_own_tokens_use(subject, model_type):
    this = subject(model_type, **MIXTURES[model_type])
    seen, expected = routed(this.model, this.layer, this.hidden_states), []
    for expert in range(EXPERTS):
        network, (x, weight) = this.ffn.expert(expert), (each.double().numpy() for each in seen.to(expert))
        gate, up, down = (each.weight.double().numpy() for each in (*network.inputs, network.down))
        projected = x @ gate.T
        neurons = weight * projected / (1 + np.exp(-projected)) * (x @ up.T)
        scores = np.abs(down).sum(axis=0) * np.sqrt(np.square(neurons).mean(axis=0))
        expected.append(np.sort(np.argsort(scores)[WIDTH - KEPT :]).tolist())
    kept = kept_by_each(this.ffn, this.prune(METHODS["wanda-sp"](), narrowed(this)).ffn)
    assert [each.tolist() for each in kept] == expected


@pytest.mark.parametrize("name", REFITTING)
def test_a_refit_gives_the_experts_outputs_back_better(mixture, name):
    """Of each expert at its own tokens, router's weight included."""
    pruned = mixture.prune(METHODS[name](), narrowed(mixture)).ffn
    seen = routed(mixture.model, mixture.layer, mixture.hidden_states)
    for expert, kept in enumerate(kept_by_each(mixture.ffn, pruned)):
        x, weight = seen.to(expert)
        neurons, down = neurons_of(mixture, expert, x) * weight, mixture.ffn.down[expert]
        output = neurons @ down.T
        refitted = (output - neurons[:, kept] @ pruned.down[expert].T).square().sum()
        assert refitted < 0.9 * (output - neurons[:, kept] @ down[:, kept].T).square().sum()


@pytest.mark.parametrize("name", [*CHOOSING, *REFITTING])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_an_expert_that_saw_no_token_keeps_the_neurons_of_the_largest_weights(subject, model_type, name):
    this, method = subject(model_type, **MIXTURES[model_type]), METHODS[name]()
    # Of two sizes, so different that every norm of the weights tells them apart.
    largest = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))[:KEPT].sort().values
    scales = torch.full((WIDTH,), 0.1).index_fill(0, largest, 3.0)
    inputs, down = this.ffn.inputs * scales[:, None], this.ffn.down * scales
    this = unused(this.changed(ffn=replace(this.ffn, inputs=inputs, down=down)))
    pruned = this.prune(method, narrowed(this)).ffn
    kept = kept_rows(this.ffn.inputs[3, -1], pruned.inputs[3, -1])
    assert torch.equal(kept, largest)
    torch.testing.assert_close(pruned.down[3], this.ffn.down[3][:, kept])  # and nothing is refitted
    assert all(tensor.isfinite().all() for tensor in (pruned.inputs, pruned.down))
    assert this.run(replace(this.layer, ffn=pruned)).isfinite().all()


@pytest.mark.parametrize("name", REFITTING)
def test_an_expert_that_saw_one_token_is_hardly_refitted(subject, name):
    this = subject("mixtral", **MIXTURES["mixtral"])
    one = replace(this, hidden_states=this.hidden_states[:1, :1])
    seen = [len(routed(one.model, one.layer, one.hidden_states).to(expert)[0]) for expert in range(EXPERTS)]
    assert sorted(seen) == [0] * 6 + [1] * 2
    pruned = one.prune(METHODS[name](), narrowed(this)).ffn
    for expert in range(EXPERTS):
        kept = kept_rows(this.ffn.inputs[expert, -1], pruned.inputs[expert, -1])
        before = this.ffn.down[expert][:, kept]
        moved = (pruned.down[expert] - before).norm() / before.norm()
        assert moved < 0.5 * seen[expert] + 1e-5


def test_a_mixture_may_have_as_few_experts_as_a_token_is_sent_to(subject):
    this = subject("mixtral", **MIXTURES["mixtral"] | {"num_local_experts": 2})
    for name in (*CHOOSING, *REFITTING):
        pruned = this.prune(METHODS[name](), narrowed(this))
        assert this.run(pruned).isfinite().all()


def test_networks_in_the_place_of_experts_stand_in_their_order(mixture):
    experts = mixture.ffn
    networks = [keep_neurons(experts.expert(number), torch.arange(number, number + 5)) for number in range(EXPERTS)]
    made = with_each(experts, networks)
    assert isinstance(made.shape, ExpertsShape) and made.shape.width == 5
    for number, network in enumerate(networks):
        found = made.expert(number)
        assert isinstance(found, FeedForward)
        for ours, theirs in zip((*found.inputs, found.down), (*network.inputs, network.down), strict=True):
            assert torch.equal(ours.weight, theirs.weight)
            assert (ours.bias is None) == (theirs.bias is None)
            assert ours.bias is None or torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_each_neuron_is_weighed_by_the_gradients_of_all_its_weights(subject, model_type):
    """Sums of |w·∂L/∂w|, and of that times the inputs' rms, the gradients those of transformers' own parameters."""
    this = subject(model_type, **MIXTURES[model_type])
    runner = LayerRunner(this.model, torch.device("cpu"), torch.float32, micro_batch=8)
    module = runner.build(this.layer, 0, torch.float32).requires_grad_()
    (runner.forward(module, 0, this.hidden_states).square().sum() / 2).backward()
    state = this.model.names(0).state_of(this.layer)
    changes = {name: parameter.grad * parameter.detach() for name, parameter in module.named_parameters()}
    mixture = this.model.layer_from_state(0, state | changes).ffn
    plain = mixture.inputs.abs().sum(dim=(1, 3)) + mixture.down.abs().sum(dim=1)
    profile = this.profile(METHODS["llm-pruner"]())
    torch.testing.assert_close(profile["experts.neurons"], plain, rtol=1e-3, atol=1e-3)

    seen, profile = routed(this.model, this.layer, this.hidden_states), this.profile(METHODS["mini-llm"]())
    for expert in range(EXPERTS):
        x, weight = seen.to(expert)
        of_input, of_neurons = (each.square().mean(dim=0).sqrt() for each in (x, neurons_of(this, expert, x) * weight))
        inputs, down = mixture.inputs[expert].abs() * of_input, mixture.down[expert].abs() * of_neurons
        scaled = inputs.sum(dim=(0, 2)) + down.sum(dim=0)
        torch.testing.assert_close(profile["experts.neurons"][expert], scaled, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_a_plan_counts_an_expert_as_much_as_tokens_go_to_it(subject, model_type):
    """FLAP's scores of a mixture: those of the neurons of each rank, a mean over the experts."""
    this = subject(model_type, **MIXTURES[model_type])
    profile = this.profile(METHODS["flap"]())
    seen = routed(this.model, this.layer, this.hidden_states)
    tokens = np.array([len(seen.to(expert)[0]) for expert in range(EXPERTS)])
    ranked = np.sort(profile["experts.neurons"].double().numpy(), axis=1)
    np.testing.assert_allclose(
        profile["neurons"].double().numpy(), tokens / tokens.sum() @ ranked, rtol=1e-4, atol=1e-5
    )
    assert profile["shared.neurons"].shape == this.ffn.shared.up.weight.shape[:1]
