"""Running decoder layers of one model over calibration hidden states, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from functools import cached_property

import torch
from torch import Tensor, nn

from distprune.checks import check_gradient, check_hidden_states
from distprune.layers.architecture import Architecture
from distprune.layers.determinism import deterministic_attention
from distprune.layers.module import EndOfPass, build_module, tapped
from distprune.layers.parts import DecoderLayer
from distprune.layers.shell import Shell
from distprune.layers.sites import Site

Observer = Callable[[dict[Site, Tensor]], None]


class LayerRunner:
    """Runs decoder layers of one model over (samples, length, d) hidden states, a micro-batch at a time.

    Args:
        architecture: the model that the layers are of, dense or pruned.
        device: where layers run.
        dtype: what weights and hidden states are cast to.
        micro_batch: samples a forward pass takes at once. It fixes the order of every accumulation, so it belongs to
            the run's configuration and not to the machine.
    """

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype, micro_batch: int):
        self.architecture = architecture
        self.device, self.dtype, self.micro_batch = device, dtype, micro_batch

    @cached_property
    def shell(self) -> Shell:
        """What surrounds the layers."""
        return Shell(self.architecture, self.device, self.dtype)

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
        sites: Collection[Site] = (),
    ) -> Tensor:
        """The layer's output hidden states, of the input's shape, dtype and on its device.

        ``observe`` is called once a micro-batch with the activations at each of ``sites``.

        Raises:
            InputError: the activations exceed the range of the dtype.
        """
        module = self.build(layer, index, self.dtype)
        output = self.empty_like(hidden_states)
        with self._tapped(module, layer, sites if observe else ()) as activations:
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
        self, layer: DecoderLayer, index: int, hidden_states: Tensor, observe: Observer, sites: Collection[Site]
    ) -> None:
        """The same without the output: no pass goes further than the last of ``sites``, and none is made for none."""
        if not sites:
            return
        module = self.build(layer, index, self.dtype)
        with self._tapped(module, layer, sites, ends_pass=True) as activations:
            for batch in hidden_states.split(self.micro_batch):
                with suppress(EndOfPass):
                    self.forward(module, index, batch.to(self.device, self.dtype))
                observe(activations)
                activations.clear()

    def backward(
        self,
        layer: DecoderLayer,
        index: int,
        hidden_states: Tensor,
        gradient: Tensor,
        *,
        observe: Observer | None = None,
        sites: Collection[Site] = (),
    ) -> Tensor:
        """The loss's gradient at a layer's input, of ``gradient``'s shape, dtype and on its device.

        The forward pass is made again, a micro-batch at a time, in the dtype for gradients.

        Args:
            layer: its weights get no gradients.
            index: which layer of the model it is.
            hidden_states: at its input, (samples, length, d).
            gradient: at its output, (samples, length, d).
            observe: called once a micro-batch with the activations and gradients at each of ``sites``.
            sites: of activations, and of their gradients.

        Raises:
            InputError: the gradients exceed the range of the dtype.
        """
        module = self.build(layer, index, self.gradient_dtype).requires_grad_(False)
        result = self.empty_like(gradient)
        with self._tapped(module, layer, sites if observe else ()) as seen:
            for start in range(0, len(hidden_states), self.micro_batch):
                batch = slice(start, start + self.micro_batch)
                # A copy, since what was made in inference mode has no gradients.
                given = hidden_states[batch].to(self.device, self.gradient_dtype, copy=True).requires_grad_()
                with torch.enable_grad():
                    output = self.forward(module, index, given)
                with deterministic_attention():
                    [at_input] = torch.autograd.grad(output, given, gradient[batch].to(output))
                check_gradient(at_input, f"layer {index}")
                result[batch] = at_input
                if observe:
                    observe(seen)
                seen.clear()
        return result

    def build(self, layer: DecoderLayer, index: int, dtype: torch.dtype) -> nn.Module:
        """The layer as a module, on the runner's device, as transformers loads it in ``dtype``."""
        return build_module(self.architecture, index, layer.to(self.device), dtype)

    def forward(self, module: nn.Module, index: int, hidden_states: Tensor) -> Tensor:
        """One pass of a module that :meth:`build` made, over hidden states in its dtype, on its device."""
        samples, length, _ = hidden_states.shape
        call = self.shell.calls(samples, length, hidden_states.dtype)[index]
        output = module(hidden_states, *call.arguments, **call.keywords)
        return output[0] if isinstance(output, tuple) else output

    def _tapped(
        self, module: nn.Module, layer: DecoderLayer, sites: Collection[Site], *, ends_pass: bool = False
    ) -> AbstractContextManager[dict[Site, Tensor]]:
        return tapped(module, self.architecture.family, layer.shape, sites, ends_pass=ends_pass)
