"""Running one decoder layer over calibration hidden states, and tapping the activations inside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from distprune.checks import check_hidden_states
from distprune.decoder_layer import DecoderLayer, state_of
from distprune.modeling import PrunedConfig, PrunedDecoderLayer, RotaryEmbedding, causal_masks

#: Activations that can be observed while a layer runs, in the order in which it makes them: (tokens, width) each.
TAPS = (
    "attention_input",
    "queries",
    "keys",
    "attention_values",
    "attention_output",
    "ffn_input",
    "ffn_neurons",
    "ffn_output",
)

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

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What gradients are computed in: they would underflow in float16."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    def empty_like(self, states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Room for results beside ``states``; in the host's memory such that a GPU copies there at full speed.

        Memory that is new to a process takes ten times as long to write to as memory that it has written to before.
        CUDA's page-locked memory is kept for the next results.
        """
        is_locked = self.device.type == "cuda" and states.device.type == "cpu"
        return torch.empty(states.shape, dtype=dtype or states.dtype, device=states.device, pin_memory=is_locked)

    @torch.inference_mode()
    def run(
        self,
        layer: DecoderLayer,
        index: int,
        hidden_states: Tensor,
        *,
        observe: Observer | None = None,
        taps: Collection[str] = TAPS,
    ) -> Tensor:
        """The layer's output hidden states, of the input's shape, dtype and on its device.

        ``observe`` is called once a micro-batch with the activations at each of ``taps``.

        Raises:
            InputError: the activations exceed the range of the dtype.
        """
        module = self.build(layer, index, self.dtype)
        output = self.empty_like(hidden_states)
        with tapped(module, taps) if observe else ExitStack() as activations:
            for start in range(0, len(hidden_states), self.micro_batch):
                batch = slice(start, start + self.micro_batch)
                given = self.forward(module, index, hidden_states[batch].to(self.device, self.dtype))
                check_hidden_states(given, index)
                output[batch] = given
                if observe:
                    observe(activations)
                    activations.clear()  # else they would lie beside the next micro-batch's
        return output

    @torch.inference_mode()
    def observe(
        self, layer: DecoderLayer, index: int, hidden_states: Tensor, observe: Observer, taps: Collection[str]
    ) -> None:
        """The same without the output: no pass goes further than the last of ``taps``, and none is made for no taps."""
        if not taps:
            return
        module = self.build(layer, index, self.dtype)
        with tapped(module, taps, ends_at=max(taps, key=TAPS.index)) as activations:
            for batch in hidden_states.split(self.micro_batch):
                with suppress(EndOfPass):
                    self.forward(module, index, batch.to(self.device, self.dtype))
                observe(activations)
                activations.clear()

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


class EndOfPass(Exception):
    """Everything that was to be seen of a forward pass has been seen."""


@contextmanager
def tapped(
    module: PrunedDecoderLayer, taps: Collection[str] = TAPS, ends_at: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass of ``module`` leaves activations in the yielded dict, (tokens, width) each.

    A layer without attention or FFN has none of its taps. A pass ends with :class:`EndOfPass` when it has come to the
    tap ``ends_at``, if one is given.
    """
    attention, ffn = module.self_attn, module.mlp
    activations: dict[str, Tensor] = {}

    def keep(tap: str, activation: Tensor) -> None:
        activations[tap] = activation.detach().flatten(0, -2)
        if tap == ends_at:
            raise EndOfPass

    def keep_input(tap: str, target: nn.Module):
        return target.register_forward_pre_hook(lambda _, inputs: keep(tap, inputs[0]))

    def keep_output(tap: str, target: nn.Module):
        return target.register_forward_hook(lambda _, __, output: keep(tap, output))

    places = {}
    if attention is not None:
        first, queries = attention.ends("q_proj")
        _, keys = attention.ends("k_proj")
        values, output = attention.ends("o_proj")
        places |= {
            "attention_input": (keep_input, first),
            "queries": (keep_output, queries),
            "keys": (keep_output, keys),
            "attention_values": (keep_input, values),
            "attention_output": (keep_output, output),
        }
    if ffn is not None:
        places |= {
            "ffn_input": (keep_input, ffn),
            "ffn_neurons": (keep_input, ffn.down_proj),
            "ffn_output": (keep_output, ffn),
        }
    handles = [keep_there(tap, place) for tap, (keep_there, place) in places.items() if tap in taps]
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()
