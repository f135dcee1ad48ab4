"""Running single layers, against the decoder layers of transformers' own models."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from distprune.decoder_layer import DecoderLayer, LowRank, state_of
from distprune.forward import TAPS, LayerRunner, tapped
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distprune.families import family_of
from distprune.methods.units import without_attention, without_ffn
from distprune.modeling import PrunedConfig

SAMPLES, LENGTH = 6, 12
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with scaled rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral, window shorter than the sequence": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2, the upper layer slides": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
}


def stock_model(model_type: str, **changes) -> PreTrainedModel:
    """A random model of transformers', its norms and biases random too so that a mistake in any of them shows."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **TINY | changes))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.25
        parameter.data = noise + 1 if "norm" in name else noise
    return model.eval()


def layers_of(model: PreTrainedModel) -> tuple[PrunedConfig, list[DecoderLayer]]:
    family = family_of(model.config)
    dense, state = family.dense_config(model.config), model.state_dict()
    return dense, [
        family.layer_from_checkpoint({name: state[name] for name in family.layer_shapes(dense, index)}, dense, index)
        for index in range(dense.num_hidden_layers)
    ]


@torch.no_grad()
def layer_inputs_and_outputs(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What goes into and comes out of every decoder layer of a stock model on random tokens."""
    seen = []

    def keep(_, inputs, output):
        seen.append((inputs[0], output))

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    model(torch.randint(64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1)))
    for handle in handles:
        handle.remove()
    return seen


def runner_of(config: PrunedConfig, micro_batch: int = 4, dtype: torch.dtype = torch.float32) -> LayerRunner:
    return LayerRunner(config, torch.device("cpu"), dtype, micro_batch)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_run_alone_computes_what_transformers_layer_does(case):
    model_type, changes = CASES[case]
    model = stock_model(model_type, **changes)
    config, layers = layers_of(model)
    runner = runner_of(config)
    for index, (given, expected) in enumerate(layer_inputs_and_outputs(model)):
        torch.testing.assert_close(runner.run(layers[index], index, given), expected, atol=1e-5, rtol=1e-5)


def test_the_window_and_the_layers_index_are_felt_at_this_length():
    """A test of the one above: the upper layer alone slides, so the lower one's mask would not do."""
    model_type, changes = CASES["qwen2, the upper layer slides"]
    model = stock_model(model_type, **changes)
    config, layers = layers_of(model)
    (_, _), (given, expected) = layer_inputs_and_outputs(model)
    assert (runner_of(config).run(layers[1], 0, given) - expected).abs().max() > 0.01


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return stock_model("llama", attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def config(llama) -> PrunedConfig:
    return layers_of(llama)[0]


@pytest.fixture(scope="module")
def layer(llama) -> DecoderLayer:
    return layers_of(llama)[1][0]


@pytest.fixture(scope="module")
def hidden_states(llama) -> torch.Tensor:
    return layer_inputs_and_outputs(llama)[0][0]


@pytest.fixture
def calibrated(layer) -> DecoderLayer:
    return replace(layer, calibration=LowRank(right=torch.randn(3, 32), left=torch.randn(32, 3)))


def observed(config: PrunedConfig, layer: DecoderLayer, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
    """The activations at every tap over all micro-batches."""
    batches = []
    runner_of(config).run(layer, 0, hidden_states, observe=lambda activations: batches.append(dict(activations)))
    return {tap: torch.cat([batch[tap] for batch in batches]) for tap in batches[0]}


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_the_micro_batch_does_not_change_what_is_computed(config, layer, hidden_states, micro_batch):
    expected = runner_of(config, micro_batch=2).run(layer, 0, hidden_states)
    actual = runner_of(config, micro_batch=micro_batch).run(layer, 0, hidden_states)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_every_tap_is_observed_once_a_micro_batch(config, layer, hidden_states):
    seen = []

    def observe(activations):
        seen.append({tap: tuple(activation.shape) for tap, activation in activations.items()})

    runner_of(config, micro_batch=4).run(layer, 0, hidden_states, observe=observe)
    widths = dict(zip(TAPS, [32, 32, 16, 32, 32, 32, 48, 32], strict=True))
    assert seen == [{tap: (samples * LENGTH, width) for tap, width in widths.items()} for samples in (4, 2)]


@pytest.mark.parametrize("tap", TAPS)
def test_a_layer_has_no_taps_of_what_it_lacks(config, layer, hidden_states, tap):
    for part, reduced in {"ffn": without_attention(layer), "attention": without_ffn(layer)}.items():
        seen = []
        runner_of(config).observe(reduced, 0, hidden_states, lambda taps, seen=seen: seen.append(list(taps)), [tap])
        assert seen == [[tap] if (part == "ffn") == tap.startswith("ffn") else []] * 2


def test_a_layer_without_anything_gives_its_input_and_has_no_taps(config, layer, hidden_states):
    seen, nothing = [], without_ffn(without_attention(layer))
    output = runner_of(config).run(nothing, 0, hidden_states, observe=lambda taps: seen.append(dict(taps)))
    assert torch.equal(output, hidden_states)
    assert seen == [{}, {}]


def test_observing_does_not_change_the_output(config, layer, hidden_states):
    runner = runner_of(config)
    watched = runner.run(layer, 0, hidden_states, observe=lambda activations: None)
    assert torch.equal(watched, runner.run(layer, 0, hidden_states))


@pytest.mark.parametrize("last", TAPS)
def test_a_pass_that_is_only_observed_ends_with_the_last_tap_asked_for(config, layer, hidden_states, last):
    runner, seen, complete = runner_of(config, micro_batch=4), [], []
    runner.run(layer, 0, hidden_states, observe=lambda activations: complete.append(dict(activations)))
    runner.observe(layer, 0, hidden_states, lambda activations: seen.append(dict(activations)), {TAPS[0], last})
    assert [list(batch) for batch in seen] == [list(dict.fromkeys((TAPS[0], last)))] * 2
    assert all(
        torch.equal(batch[tap], all_taps[tap]) for batch, all_taps in zip(seen, complete, strict=True) for tap in batch
    )


def test_nothing_is_run_where_nothing_is_observed(config, layer, hidden_states, monkeypatch):
    monkeypatch.setattr(LayerRunner, "forward", None)
    runner_of(config).observe(layer, 0, hidden_states, lambda activations: None, set())


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_the_taps_hang_together_as_the_layers_equations_say(config, layer, hidden_states):
    """Every tap from the one before it, in float64."""
    tap = {name: activation.double() for name, activation in observed(config, layer, hidden_states).items()}
    exact, x = layer.to(torch.float64), hidden_states.flatten(0, 1).double()
    close = {"atol": 1e-4, "rtol": 1e-4}

    def affine(linear, x):
        return x @ linear.weight.T + linear.bias

    eps = config.rms_norm_eps
    torch.testing.assert_close(tap["attention_input"], rms_norm(x, exact.attention_norm, eps), **close)
    # The first token attends to itself alone: its values are those of its KV group, once for every query head.
    values = affine(exact.value, tap["attention_input"]).unflatten(1, (2, 8)).repeat_interleave(2, dim=1)
    torch.testing.assert_close(tap["attention_values"][::LENGTH], values.flatten(1)[::LENGTH], **close)
    torch.testing.assert_close(tap["attention_output"], affine(exact.output, tap["attention_values"]), **close)
    torch.testing.assert_close(tap["ffn_input"], rms_norm(x + tap["attention_output"], exact.ffn_norm, eps), **close)
    gate, up = affine(exact.gate, tap["ffn_input"]), affine(exact.up, tap["ffn_input"])
    torch.testing.assert_close(tap["ffn_neurons"], torch.nn.functional.silu(gate) * up, **close)
    torch.testing.assert_close(tap["ffn_output"], affine(exact.down, tap["ffn_neurons"]), **close)
    output = runner_of(config).run(layer, 0, hidden_states).flatten(0, 1).double()
    torch.testing.assert_close(output, x + tap["attention_output"] + tap["ffn_output"], **close)


def test_the_ffn_output_holds_the_calibration_branch(config, calibrated, layer, hidden_states):
    tap, plain = (observed(config, each, hidden_states) for each in (calibrated, layer))
    branch = tap["ffn_input"] @ calibrated.calibration.right.T @ calibrated.calibration.left.T
    torch.testing.assert_close(tap["ffn_output"], plain["ffn_output"] + branch, atol=1e-4, rtol=1e-4)
    assert branch.abs().max() > 1


def hooks(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_hooks_are_gone_when_the_taps_close_and_when_a_forward_pass_fails(config, layer):
    module = runner_of(config).build(layer, 0, torch.float32)
    with tapped(module):
        assert hooks(module) == len(TAPS)
    assert hooks(module) == 0
    with pytest.raises(RuntimeError, match="forward failed"), tapped(module):
        raise RuntimeError("forward failed")
    assert hooks(module) == 0


def read_only(tensor: torch.Tensor) -> torch.Tensor:
    """As tensors come from shared memory: numpy refuses writes to them."""
    array = tensor.numpy().copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def test_read_only_hidden_states_run_without_a_warning_and_stay_as_they_are(config, layer, hidden_states):
    expected = runner_of(config).run(layer, 0, hidden_states)
    shared = read_only(hidden_states)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = runner_of(config).run(layer, 0, shared)
    assert torch.equal(output, expected)
    np.testing.assert_array_equal(shared.numpy(), hidden_states.numpy())
    assert output.data_ptr() != shared.data_ptr()


def test_the_output_has_the_inputs_dtype_and_the_runner_its_own(config, layer, hidden_states):
    """Weights in float32, hidden states in bfloat16, computed in either."""
    given = hidden_states.bfloat16()
    exact = runner_of(config).run(layer, 0, given.float())
    seen = []
    fine, coarse = (
        runner_of(config, dtype=dtype).run(layer, 0, given, observe=lambda taps: seen.append(taps["ffn_neurons"].dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert fine.dtype == coarse.dtype == torch.bfloat16
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert torch.equal(fine, exact.bfloat16())
    torch.testing.assert_close(coarse, fine, atol=0.3, rtol=0.1)


def test_a_pruned_layer_runs_under_the_dense_models_configuration(config, layer, hidden_states):
    """Half the values and neurons: what is missing is what zeros in the dense layer leave out."""
    kept_values, kept_neurons = torch.arange(0, 16, 2), torch.arange(0, 48, 2)
    kept_columns = torch.arange(0, 32, 2)

    def cut(linear, rows=slice(None), columns=slice(None)):
        return replace(linear, weight=linear.weight[rows][:, columns], bias=linear.bias[rows])

    def blank(linear, rows):
        keep = torch.zeros(len(linear.weight), 1).index_fill(0, rows, 1)
        return replace(linear, weight=linear.weight * keep, bias=linear.bias * keep[:, 0])

    pruned = replace(
        layer,
        value=cut(layer.value, rows=kept_values),
        output=cut(layer.output, columns=kept_columns),
        gate=cut(layer.gate, rows=kept_neurons),
        up=cut(layer.up, rows=kept_neurons),
        down=cut(layer.down, columns=kept_neurons),
    )
    zeroed = replace(layer, value=blank(layer.value, kept_values), up=blank(layer.up, kept_neurons))
    runner = runner_of(config)
    assert pruned.shape.value_dim == 4 and pruned.shape.ffn_width == 24
    torch.testing.assert_close(
        runner.run(pruned, 0, hidden_states), runner.run(zeroed, 0, hidden_states), atol=1e-5, rtol=1e-5
    )


def test_the_runner_leaves_layer_and_configuration_as_they_were(llama, layer, hidden_states):
    before = {name: tensor.clone() for name, tensor in state_of(layer).items()}
    config, _ = layers_of(llama)
    config._attn_implementation = kernel = "eager"
    runner_of(config, dtype=torch.bfloat16).run(layer, 0, hidden_states)
    assert config._attn_implementation == kernel
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(layer).items())
