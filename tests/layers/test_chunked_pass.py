"""A layer whose experts come a chunk at a time does what it does as a whole, forward, backward and at every site."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from distprune.layers.architecture import Architecture
from distprune.layers.chunked_pass import ChunkedPass, Routed
from distprune.layers.expert_chunks import ExpertChunks
from distprune.layers.parts import DecoderLayer, Experts
from distprune.layers.runner import LayerRunner
from distprune.layers.sites import (
    EXPERT_NEURONS,
    EXPERT_OUTPUT,
    FFN_INPUT,
    FFN_OUTPUT,
    ROUTER_WEIGHT,
    SHARED_NEURONS,
    Site,
)

EXPERTS, AT_ONCE, HIDDEN, LENGTH, INDEX = 8, 3, 64, 12, 1
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
#: Softmax and sigmoid routers, shared experts of both kinds, groups, and gpt-oss's transposed matrices with biases.
FAMILIES = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": EXPERTS},
    "qwen2_moe": {
        "moe_intermediate_size": 48,
        "intermediate_size": 96,
        "num_experts": EXPERTS,
        "shared_expert_intermediate_size": 80,
    },
    "gpt_oss": {"intermediate_size": 48, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16},
    "deepseek_v3": {
        "moe_intermediate_size": 48,
        "intermediate_size": 96,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
        **LATENT,
    },
}


class Whole:
    """A layer as it is, its experts taken out, and how they come."""

    def __init__(self, family: str):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**COMMON | FAMILIES[family])).eval()
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.1)
        self.architecture = Architecture(model.config)
        prefix = self.architecture.layer_prefix(INDEX)
        state = {n.removeprefix(prefix): t for n, t in model.state_dict().items() if n.startswith(prefix)}
        self.layer = self.architecture.layer_from_state(INDEX, state)
        names = self.architecture.names(INDEX)
        apart = {name: tensor.to("meta") if names.is_of_experts(name) else tensor for name, tensor in state.items()}
        frame = self.architecture.layer_from_state(INDEX, apart)
        self.frame = replace(frame, ffn=replace(frame.ffn, elsewhere=torch.arange(EXPERTS)))

        def read(numbers: Tensor) -> dict[str, Tensor]:
            assert len(numbers) <= AT_ONCE
            return {name: tensor[numbers] for name, tensor in state.items() if names.is_of_experts(name)}

        self.chunks = ExpertChunks(names, read, AT_ONCE)
        generator = torch.Generator().manual_seed(1)
        self.states, self.gradient = torch.randn(2, 5, LENGTH, HIDDEN, generator=generator)

    def runner(self, dtype: torch.dtype = torch.float32) -> LayerRunner:
        return LayerRunner(self.architecture, torch.device("cpu"), dtype, 2)

    def routed_pass(self, sites=(), dtype: torch.dtype = torch.float32) -> tuple[ChunkedPass, Seen]:
        seen = Seen()
        chunked = ChunkedPass(self.runner(dtype), self.frame, INDEX, self.states)
        chunked.route(seen, sites)
        return chunked, seen


class Seen(dict):
    """Everything seen at every site, rows in an order of their own."""

    def __bool__(self) -> bool:
        return True

    def __call__(self, activations: dict[Site, Tensor]) -> None:
        for site, activation in activations.items():
            self.setdefault(site, []).append(activation.clone())

    def grams(self) -> dict[Site, Tensor]:
        return {site: sum(x.double().mT @ x.double() for x in each) for site, each in self.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request) -> Whole:
    return Whole(request.param)


def of_experts(*places: Site) -> list[Site]:
    return [place.of(number) for number in range(EXPERTS) for place in places]


def assert_same_grams(found: Seen, expected: Seen) -> None:
    assert found.keys() == expected.keys() != set()
    for site, gram in expected.grams().items():
        torch.testing.assert_close(found.grams()[site], gram, rtol=1e-5, atol=1e-6)


def test_forward_and_what_is_seen_are_those_of_the_whole_layer(whole):
    own = of_experts(EXPERT_NEURONS, EXPERT_OUTPUT, ROUTER_WEIGHT)
    early, late = [FFN_INPUT, *([SHARED_NEURONS] if whole.layer.ffn.shared else [])], [FFN_OUTPUT]
    expected = Seen()
    wanted = whole.runner().run(whole.layer, INDEX, whole.states, observe=expected, sites=[*own, *early, *late])

    chunked, seen = whole.routed_pass(early)
    for numbers, chunk in whole.chunks.of(whole.frame.ffn):
        assert chunk.shape.count == len(numbers) <= AT_ONCE
        there = [site for site in own if site.expert in numbers]
        chunked.add_outputs(numbers, chunked.outputs(numbers, chunk, seen, there))
    output = chunked.output(seen, late)

    torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)
    assert_same_grams(seen, expected)


def test_backward_and_what_is_seen_are_those_of_the_whole_layer(whole):
    own, after = of_experts(EXPERT_NEURONS), [FFN_OUTPUT.gradient]
    others = [FFN_INPUT, FFN_INPUT.gradient]
    expected, seen = Seen(), Seen()
    runner = whole.runner()
    states = whole.states, whole.gradient
    wanted = runner.backward(whole.layer, INDEX, *states, observe=expected, sites=[*own, *after, *others])

    chunked, _ = whole.routed_pass()
    for numbers, chunk in whole.chunks.of(whole.frame.ffn):
        chunked.add_outputs(numbers, chunked.outputs(numbers, chunk))
    at_experts = chunked.backward_to_experts(whole.gradient, seen, after)
    for numbers, chunk in whole.chunks.of(whole.frame.ffn):
        there = [site for site in own if site.expert in numbers]
        chunked.add_gradients(numbers, chunked.gradients(numbers, chunk, at_experts, seen, there))
    found = chunked.backward_to_input(whole.gradient, seen, others)

    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert_same_grams(seen, expected)


def test_the_gradient_is_the_one_that_autograd_takes_through_the_familys_own_layer(whole):
    runner = whole.runner()
    module = runner.build(whole.layer, INDEX, torch.float32)
    given = whole.states[:2].clone().requires_grad_()
    [expected] = torch.autograd.grad(runner.forward(module, INDEX, given), given, whole.gradient[:2])
    chunked, _ = whole.routed_pass()
    for numbers, chunk in whole.chunks.of(whole.frame.ffn):
        chunked.add_outputs(numbers, chunked.outputs(numbers, chunk))
    at_experts = chunked.backward_to_experts(whole.gradient)
    for numbers, chunk in whole.chunks.of(whole.frame.ffn):
        chunked.add_gradients(numbers, chunked.gradients(numbers, chunk, at_experts))
    torch.testing.assert_close(chunked.backward_to_input(whole.gradient)[:2], expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_sums_are_rounded_once(whole):
    chunked, _ = whole.routed_pass(dtype=torch.bfloat16)
    for numbers, chunk in whole.chunks.of(whole.frame.ffn):
        chunked.add_outputs(numbers, chunked.outputs(numbers, chunk))
    exact = whole.runner().run(whole.layer, INDEX, whole.states)
    at_once = whole.runner(torch.bfloat16).run(whole.layer, INDEX, whole.states)
    assert (chunked.output() - exact).norm() < 1.1 * (at_once - exact).norm()


def test_an_expert_that_no_token_chooses_is_seen_with_no_tokens(whole):
    chunked, _ = whole.routed_pass()
    chunked.routed = [
        Routed.of(each.batch, each.inputs, torch.where(each.chosen == 4, 5, each.chosen), each.weights, EXPERTS)
        for each in chunked.routed
    ]
    numbers, chunk = [*whole.chunks.of(whole.frame.ffn)][1]
    seen = Seen()
    chunked.outputs(numbers, chunk, seen, [EXPERT_NEURONS.of(4)])
    assert all(tuple(each.shape) == (0, 48) for each in seen[EXPERT_NEURONS.of(4)])


def test_a_layer_that_calls_other_experts_is_not_given_the_sums(whole):
    chunked, _ = whole.routed_pass()
    router = replace(whole.frame.ffn.router, weight=whole.frame.ffn.router.weight.flip(0))
    other = replace(whole.frame, ffn=replace(whole.frame.ffn, router=router))
    with pytest.raises(AssertionError, match="other experts"):
        ChunkedPass(whole.runner(), other, INDEX, whole.states, routed=chunked.routed).output()


def test_a_frame_moves_without_its_experts(whole):
    moved = whole.frame.to("cpu", torch.bfloat16)
    assert isinstance(moved, DecoderLayer) and isinstance(moved.ffn, Experts)
    assert moved.ffn.down.is_meta and moved.ffn.router.weight.dtype == torch.bfloat16
    assert torch.equal(moved.ffn.elsewhere, torch.arange(EXPERTS))


def test_a_layer_that_no_machine_could_hold_is_described_at_once():
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 2**16, "vocab_size": 96}
    config = CONFIG_MAPPING["deepseek_v3"](**sizes)
    assert Architecture(config).dense_shape(0).ffn.count == 2**16
