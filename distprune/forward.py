"""Running one decoder layer over calibration hidden states, and tapping the activations inside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from distprune.decoder_layer import DecoderLayer, state_of
from distprune.modeling import PrunedConfig, PrunedDecoderLayer, RotaryEmbedding, causal_masks

#: Activations that can be observed while a layer runs: (tokens, width) each.
TAPS = ("attention_input", "attention_values", "attention_output", "ffn_input", "ffn_neurons", "ffn_output")

Observer = Callable[[dict[str, Tensor]], None]


class LayerRunner:
    """Runs decoder layers of one model over (samples, length, d) hidden states, a micro-batch at a time.

    Args:
        config: the model that the layers are of, dense or pruned.
        device: where layers run.
        dtype: what weights and hidden states are cast to.
        micro_batch: samples a forward pass takes at once. It fixes the order of every accumulation, so it belongs to
            the run's configuration and not to the machine.
    """

    def __init__(self, config: PrunedConfig, device: torch.device, dtype: torch.dtype, micro_batch: int):
        self.config = copy.copy(config)
        self.config._attn_implementation = "sdpa"
        self.device, self.dtype, self.micro_batch = device, dtype, micro_batch
        self.rotary = RotaryEmbedding(config).to(device)

    @torch.inference_mode()
    def run(self, layer: DecoderLayer, index: int, hidden_states: Tensor, *, observe: Observer | None = None) -> Tensor:
        """The layer's output hidden states, of the input's shape, dtype and on its device.

        ``observe`` is called once a micro-batch with the activations at each of :data:`TAPS`.
        """
        module = self.build(layer, index, self.dtype)
        output = torch.empty_like(hidden_states)
        with tapped(module) if observe else ExitStack() as activations:
            for start in range(0, len(hidden_states), self.micro_batch):
                batch = slice(start, start + self.micro_batch)
                output[batch] = self.forward(module, index, hidden_states[batch].to(self.device, self.dtype))
                if observe:
                    observe(activations)
                    activations.clear()  # else they would lie beside the next micro-batch's
        return output

    def build(self, layer: DecoderLayer, index: int, dtype: torch.dtype) -> PrunedDecoderLayer:
        """The layer as a module, on the runner's device."""
        with init_empty_weights():
            module = PrunedDecoderLayer(self.config, index, layer.shape)
        module.load_state_dict(state_of(layer.to(self.device, dtype)), assign=True)
        return module.eval()

    def forward(self, module: PrunedDecoderLayer, index: int, hidden_states: Tensor) -> Tensor:
        """One pass of a module that :meth:`build` made, over hidden states in its dtype, on its device."""
        positions = torch.arange(hidden_states.shape[1], device=self.device)[None]
        masks = causal_masks(self.config, hidden_states, position_ids=positions)
        return module(
            hidden_states,
            attention_mask=masks[self.config.layer_types[index]],
            position_ids=positions,
            position_embeddings=self.rotary(hidden_states, positions),
        )


@contextmanager
def tapped(module: PrunedDecoderLayer) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass of ``module`` leaves its activations in the yielded dict, (tokens, width) each."""
    attention, ffn = module.self_attn, module.mlp
    activations: dict[str, Tensor] = {}

    def keep_input(tap: str):
        return lambda _, inputs, __: activations.__setitem__(tap, inputs[0].flatten(0, -2))

    def keep_output(tap: str):
        return lambda _, __, output: activations.__setitem__(tap, output.flatten(0, -2))

    def hook(target: nn.Module, action):
        return target.register_forward_hook(action)

    handles = [
        hook(attention.v_proj, keep_input("attention_input")),
        hook(attention.o_proj, keep_input("attention_values")),
        hook(attention.o_proj, keep_output("attention_output")),
        hook(ffn, keep_input("ffn_input")),
        hook(ffn.down_proj, keep_input("ffn_neurons")),
        hook(ffn, keep_output("ffn_output")),
    ]
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()
