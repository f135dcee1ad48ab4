"""Running one decoder layer backwards, and tapping the gradients inside it.

Gradients are those of the loss that :mod:`distprune.loss` is about, a sum over tokens. A weight's gradient is a moment:
of y = x Wᵀ + b it is T·E[gᵀx], with g the gradient at y and T the number of tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distprune.checks import check_gradient
from distprune.decoder_layer import DecoderLayer
from distprune.determinism import deterministic_attention
from distprune.forward import TAPS, LayerRunner, Observer, tapped
from distprune.modeling import PrunedDecoderLayer

#: Gradients that can be observed while a layer runs backwards: (tokens, width) each, at the outputs of the projections
#: (before norms of heads and rotary embedding) and of the FFN.
GRADIENT_TAPS = (
    "query_gradient",
    "key_gradient",
    "value_gradient",
    "attention_output_gradient",
    "gate_gradient",
    "up_gradient",
    "ffn_output_gradient",
)
ALL_TAPS = TAPS + GRADIENT_TAPS


def backward(
    runner: LayerRunner,
    layer: DecoderLayer,
    index: int,
    hidden_states: Tensor,
    gradient: Tensor,
    *,
    observe: Observer | None = None,
    taps: Collection[str] = ALL_TAPS,
) -> Tensor:
    """The loss's gradient at a layer's input, of ``gradient``'s shape, dtype and on its device.

    The forward pass is made again, a micro-batch at a time, in the runner's dtype for gradients.

    Args:
        runner: what runs the layer, and on which device.
        layer: the layer; its weights get no gradients.
        index: which layer of the model it is.
        hidden_states: at its input, (samples, length, d).
        gradient: at its output, (samples, length, d).
        observe: called once a micro-batch with the activations and gradients at each of ``taps``.
        taps: of :data:`distprune.forward.TAPS` and of :data:`GRADIENT_TAPS`.

    Raises:
        InputError: the gradients exceed the range of the dtype.
    """
    module = runner.build(layer, index, runner.gradient_dtype).requires_grad_(False)
    result = runner.empty_like(gradient)
    taps = taps if observe else ()
    with tapped(module, taps) as activations, gradients_tapped(module, taps) as gradients:
        for start in range(0, len(hidden_states), runner.micro_batch):
            batch = slice(start, start + runner.micro_batch)
            # A copy, since what was made in inference mode has no gradients.
            given = hidden_states[batch].to(runner.device, runner.gradient_dtype, copy=True).requires_grad_()
            with torch.enable_grad():
                output = runner.forward(module, index, given)
            with deterministic_attention():
                [at_input] = torch.autograd.grad(output, given, gradient[batch].to(output))
            check_gradient(at_input, f"layer {index}")
            result[batch] = at_input
            if observe:
                observe(activations | gradients)
            activations.clear()
            gradients.clear()
    return result


@contextmanager
def gradients_tapped(module: PrunedDecoderLayer, taps: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every backward pass of ``module`` leaves gradients in the yielded dict, (tokens, width) each."""
    attention, ffn = module.self_attn, module.mlp
    gradients: dict[str, Tensor] = {}

    def keep(tap: str, gradient: Tensor) -> None:
        gradients[tap] = gradient.flatten(0, -2)

    def keep_at_output(tap: str, target: nn.Module):
        def await_gradient(_, __, output: Tensor) -> None:
            output.register_hook(lambda gradient: keep(tap, gradient))

        return target.register_forward_hook(await_gradient)

    places = {
        "query_gradient": attention.ends("q_proj")[1],
        "key_gradient": attention.ends("k_proj")[1],
        "value_gradient": attention.ends("v_proj")[1],
        "attention_output_gradient": attention.ends("o_proj")[1],
        "gate_gradient": ffn.gate_proj,
        "up_gradient": ffn.up_proj,
        "ffn_output_gradient": ffn,
    }
    handles = [keep_at_output(tap, place) for tap, place in places.items() if tap in taps]
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()
