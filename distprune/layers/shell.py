"""What surrounds a model's layers, without the layers: the model's own forward with stubs in their place.

The stubs record what the model calls its layers with, masks, positions and whatever else is a layer's own, or put
hidden states in after the last of them. So embedding, norm, soft cap, head and all that lies between is transformers'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from distprune.layers.architecture import Architecture
from distprune.layers.loaded_dtypes import loaded_dtype
from distprune.layers.tree import build_on_meta
from distprune.modeling.cache_name import CACHE


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside its hidden states."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


class _Reached(Exception):
    """The forward pass has come to where it was to go."""


class _Stub(nn.Module):
    """Stands in for a layer: notes what it is called with, and gives back what it is told to, or what it gets."""

    def __init__(self, layer: nn.Module, shell: Shell, index: int):
        super().__init__()
        # What the model's forward reads of a layer: its type, its window.
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training" and not isinstance(value, (nn.Module, Tensor)):
                setattr(self, name, value)
        self._called = partial(shell.layer_called, index)

    def forward(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return self._called(hidden_states, Call(arguments, keywords))


class Shell:
    """The shell of one model on one device.

    Args:
        architecture: the model.
        device: where its outer tensors are, and layers are to run.
        dtype: of the outer tensors and of hidden states.
    """

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype):
        self._architecture, self.device, self.dtype = architecture, device, dtype
        self.model = build_on_meta(architecture.config)
        layers = self.model.get_submodule(architecture.layers_path)
        assert isinstance(layers, nn.ModuleList)
        self._layers = len(layers)
        for index, layer in enumerate(layers):
            layers[index] = _Stub(layer, self, index)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._large = {architecture.embedding_name, architecture.head_name}
        self._calls: dict[tuple[int, int, torch.dtype], list[Call]] = {}
        self._recorded: list[Call] = []
        self._ends_at: int | None = None
        self._first: Tensor | None = None
        self._injected: Tensor | None = None

    def layer_called(self, index: int, hidden_states: Tensor, call: Call) -> Tensor:
        """A stub's forward."""
        if index == 0:
            self._first, self._recorded = hidden_states, []
        self._recorded.append(call)
        if index == self._ends_at:
            raise _Reached
        last = index == self._layers - 1
        return self._injected if last and self._injected is not None else hidden_states

    # ---------------------------------------------------------------- outer tensors

    def fill(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
        """Give the model some of its tensors outside the layers, by their names in its state dict."""
        for name, tensor in tensors.items():
            path, _, own = name.rpartition(".")
            module = self.model.get_submodule(path)
            placed = tensor.to(self.device, loaded_dtype(self.model, name, dtype or self.dtype))
            if own in module._parameters:
                module._parameters[own] = nn.Parameter(placed, requires_grad=False)
            else:
                module._buffers[own] = placed

    def empty(self, names: Iterable[str]) -> None:
        """Free the memory of some of these tensors, which have to be filled again before they are asked for."""
        for name in names:
            path, _, own = name.rpartition(".")
            module = self.model.get_submodule(path)
            tensor = module.get_parameter(own)
            module._parameters[own] = nn.Parameter(tensor.to("meta"), requires_grad=False)

    def _fill_with_zeros(self, except_for: set[str]) -> None:
        """Stand-ins for small tensors that don't matter to what is asked."""
        missing = {
            name: torch.zeros(tensor.shape, dtype=self.dtype)
            for name, tensor in self.model.state_dict().items()
            if tensor.is_meta and name not in except_for
        }
        self.fill(missing)

    # ---------------------------------------------------------------- what it is asked

    @torch.inference_mode(False)  # what is made in inference mode can't take part in gradients later
    @torch.no_grad()
    def calls(self, samples: int, length: int, dtype: torch.dtype) -> list[Call]:
        """What each layer is called with for hidden states (samples, length, d) of some dtype, nothing padded."""
        key = samples, length, dtype
        if key not in self._calls:
            self._fill_with_zeros(self._large)
            self._run_to(self._layers - 1, inputs_embeds=self._no_embeddings(samples, length, dtype))
            self._calls[key] = self._recorded
        return self._calls[key]

    @torch.no_grad()
    def calls_with_cache(self, samples: int, length: int, dtype: torch.dtype, cache: Cache) -> list[Call]:
        """The same for the next tokens of samples, where a cache has seen those before them."""
        self._fill_with_zeros(self._large)
        embeddings = self._no_embeddings(samples, length, dtype)
        self._run_to(self._layers - 1, inputs_embeds=embeddings, use_cache=True, **{CACHE: cache})
        return self._recorded

    @torch.no_grad()
    def embed(self, rows: Tensor, places: Tensor) -> Tensor:
        """The hidden states at the first layer's input.

        Args:
            rows: the embeddings of some tokens, (tokens, d).
            places: which of them each token of the samples is, (samples, length).
        """
        self.fill({self._architecture.embedding_name: rows})
        self._run_to(0, input_ids=places.to(self.device))
        assert self._first is not None
        return self._first

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The logits (tokens, vocabulary) of hidden states (tokens, d) at the last layer's output."""
        self._injected = hidden_states[None]
        try:
            nothing = self._no_embeddings(1, len(hidden_states), hidden_states.dtype)
            return self.model(inputs_embeds=nothing, use_cache=False).logits[0]
        finally:
            self._injected = None

    def _no_embeddings(self, samples: int, length: int, dtype: torch.dtype) -> Tensor:
        """Embeddings that don't matter. Those of some families are narrower than the hidden states made of them."""
        _, width = self.model.get_input_embeddings().get_parameter("weight").shape
        return torch.zeros(samples, length, width, dtype=dtype, device=self.device)

    def _run_to(self, index: int, *, use_cache: bool = False, **inputs: Any) -> None:
        self._ends_at = index
        try:
            self.model(**inputs, use_cache=use_cache)
        except _Reached:
            pass
        finally:
            self._ends_at = None
