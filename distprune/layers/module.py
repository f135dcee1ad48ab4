"""A layer as a module: its family's own class, changed to its shape, filled with its tensors and tapped at sites."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from distprune.families import Family, Fused
from distprune.layers.architecture import Architecture, pruned_layer
from distprune.layers.empty import empty_weights
from distprune.layers.expert_names import EXPERTS, find_experts
from distprune.layers.expert_places import ExpertPlaces
from distprune.layers.loaded_dtypes import loaded_dtype
from distprune.layers.parts import DecoderLayer, Experts
from distprune.layers.shapes import AttentionShape, ExpertsShape, LayerShape
from distprune.layers.sites import (
    ATTENDED,
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    FFN_INPUT,
    FFN_OUTPUT,
    GATE,
    KEYS,
    LAYER_INPUT,
    LAYER_OUTPUT,
    NEURONS,
    QUERIES,
    SHARED_GATE,
    SHARED_NEURONS,
    SHARED_OUTPUT,
    SHARED_UP,
    UP,
    VALUES,
    Site,
)
from distprune.layers.tree import build_on_meta
from distprune.modeling.pruned_layers import reshape_layer
from distprune.modeling.pruned_projections import ends

Select = Callable[[Tensor], Tensor]


def build_module(architecture: Architecture, index: int, layer: DecoderLayer, dtype: torch.dtype) -> nn.Module:
    """The layer as a module of its family's class, on the layer's device, as transformers loads it in ``dtype``.

    Its parameters are the layer's own tensors and not copies of them, except for those of another dtype and for
    projections that the family keeps in one matrix.
    """
    shape = layer.shape
    with empty_weights():
        module = architecture.layer_class(index)(architecture.layer_config(index, shape), index)
        reshape_layer(module, family_names(architecture.family), said_shape(architecture, index, layer), index)
    return _filled(module, architecture, index, architecture.names(index).state_of(layer), dtype)


def build_experts(architecture: Architecture, index: int, experts: Experts, dtype: torch.dtype) -> nn.Module:
    """Some experts of a layer as a module of their family's class: the one within its mixture that runs all experts."""
    names = architecture.names(index)
    shape = architecture.dense_shape(index).with_ffn(count=experts.shape.count, width=experts.shape.width)
    state = names.state_of(DecoderLayer(None, experts))
    with empty_weights():
        module = architecture.layer_class(index)(architecture.layer_config(index, shape), index)
    path = f"{architecture.family.ffn}.{EXPERTS}"
    cast = _as_loaded(architecture, index, {n: tensor for n, tensor in state.items() if names.is_of_experts(n)}, dtype)
    own = module.get_submodule(path)
    own.load_state_dict({name.removeprefix(path + "."): tensor for name, tensor in cast.items()}, assign=True)
    return own.eval()


def build_from_state(
    architecture: Architecture, index: int, state: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """The same of a layer of the model, filled with its state as a checkpoint holds it."""
    return _filled(empty_layer(architecture, index), architecture, index, state, dtype)


def _filled(
    module: nn.Module, architecture: Architecture, index: int, state: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    module.load_state_dict(_as_loaded(architecture, index, state, dtype), assign=True)
    return module.eval()


def _as_loaded(
    architecture: Architecture, index: int, state: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A layer's tensors in the dtypes that transformers loads them in."""
    prefix = architecture.layer_prefix(index)
    return {
        name: tensor.to(loaded_dtype(architecture.model, prefix + name, dtype))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def empty_layer(architecture: Architecture, index: int, shape: LayerShape | None = None) -> nn.Module:
    """A layer of the model as a module of its family's class on the meta device, as an earlier pruning has left it, or
    with other numbers of heads and neurons."""
    dense, said = architecture.dense_layer(index), pruned_layer(architecture.config, index)
    if shape is None and said is not None:
        shape = dense.shape
    with empty_weights():
        module = architecture.layer_class(index)(architecture.layer_config(index, shape), index)
        if said is not None and shape is not None:
            pairs = None if dense.attention is None else dense.attention.rotary_pairs
            pairs = None if pairs is None or shape.attention is None else pairs[: shape.attention.kv_heads]
            reshaped = {**said, **say_shape(architecture.class_shape(index), shape, pairs)}
            reshape_layer(module, family_names(architecture.family), reshaped, index)
    return module


def empty_model(architecture: Architecture) -> PreTrainedModel:
    """The whole model on the meta device, its layers as an earlier pruning has left them."""
    model = build_on_meta(architecture.config)
    layers = model.get_submodule(architecture.layers_path)
    assert isinstance(layers, nn.ModuleList)
    for index in range(len(layers)):
        layers[index] = empty_layer(architecture, index)
    return model


def family_names(family: Family) -> dict[str, Any]:
    """The family's names as code in a checkpoint takes them."""
    return asdict(family)


def said_shape(architecture: Architecture, index: int, layer: DecoderLayer) -> dict[str, Any]:
    """The layer's shape as code in a checkpoint takes it. Parts that the layer never had are not named."""
    pairs = None if layer.attention is None else layer.attention.rotary_pairs
    return say_shape(architecture.class_shape(index), layer.shape, pairs)


def say_shape(of_class: LayerShape, shape: LayerShape, rotary_pairs: Tensor | None) -> dict[str, Any]:
    """The same of a layer of some shape that has kept these rotary pairs, made from the one that its class has."""
    said: dict[str, Any] = {}
    if of_class.attention is not None:
        pairs = None if rotary_pairs is None else rotary_pairs.tolist()
        said["attention"] = shape.attention and asdict(shape.attention) | {"rotary_pairs": pairs}
    if of_class.ffn is not None:
        said["ffn"] = shape.ffn and asdict(shape.ffn)
    return said


# ---------------------------------------------------------------- sites


class EndOfPass(Exception):
    """Everything that was to be seen of a forward pass has been seen."""


@contextmanager
def tapped(
    module: nn.Module, family: Family, shape: LayerShape, sites: Collection[Site], *, ends_pass: bool = False
) -> Iterator[dict[Site, Tensor]]:
    """While open, every pass of ``module`` leaves activations in the yielded dict, (tokens, width) each; and where
    sites are gradients, what reaches them backwards.

    A layer without a part has none of its sites. With ``ends_pass``, a forward pass ends with :class:`EndOfPass` when
    the last of the sites has been come to.
    """
    found = {site: place for site, place in places(module, family, shape).items() if {site, site.gradient} & set(sites)}
    has_experts = isinstance(shape.ffn, ExpertsShape)
    of_experts = [site for site in sites if site.expert is not None and has_experts]
    activations: dict[Site, Tensor] = {}

    def keep(site: Site, activation: Tensor) -> None:
        activations[site] = activation
        if ends_pass and len(activations) == len(found) + len(of_experts):
            raise EndOfPass

    handles: list[Any] = [
        place.watch(site, site in sites, site.gradient in sites, keep) for site, place in found.items()
    ]
    if of_experts:
        handles += ExpertPlaces(mixture_of(module, family).experts, of_experts, keep).watch()
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


class Place:
    """A module whose input or output is an activation at a site, or holds it among others."""

    def __init__(self, module: nn.Module, of: str, select: Select = lambda activation: activation):
        self._module, self._of, self._select = module, of, select

    def watch(self, site: Site, forward: bool, backward: bool, keep: Callable[[Site, Tensor], None]) -> RemovableHandle:
        """See every activation, and what reaches it backwards, until the handle is removed."""

        def see(activation: Tensor) -> None:
            if backward:
                activation.register_hook(lambda gradient: keep(site.gradient, self._flat(gradient)))
            if forward:
                keep(site, self._flat(activation.detach()))

        if self._of == "input":
            return self._module.register_forward_pre_hook(lambda _, inputs: see(inputs[0]))
        return self._module.register_forward_hook(lambda _, __, output: see(first(output)))

    def _flat(self, activation: Tensor) -> Tensor:
        return self._select(activation).flatten(0, -2)


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A module's output, beside which some give others: a mixture its router's weights."""
    return output[0] if isinstance(output, tuple) else output


def places(module: nn.Module, family: Family, shape: LayerShape) -> dict[Site, Place]:
    """Where a layer's sites are in its module, in the order in which its parts come to them."""
    found = {LAYER_INPUT: Place(module, "input")}
    if shape.attention is not None:
        found |= _attention_places(getattr(module, family.attention), family, shape.attention)
    if isinstance(shape.ffn, ExpertsShape):
        found |= _mixture_places(mixture_of(module, family), family)
    elif shape.ffn is not None:
        found |= _ffn_places(module if family.ffn is None else getattr(module, family.ffn), family, shape.ffn.width)
    return found | {LAYER_OUTPUT: Place(module, "output")}


def _attention_places(attention: nn.Module, family: Family, shape: AttentionShape) -> dict[Site, Place]:
    fused = family.qkv if family.qkv is not None and family.qkv.name in attention._modules else None
    if fused is not None:
        whole = attention.get_submodule(fused.name)
        widths = (
            shape.query_heads * shape.query_key_dim,
            shape.kv_heads * shape.query_key_dim,
            shape.kv_heads * shape.value_dim,
        )
        queries, keys, values = (Place(whole, "output", select) for select in selections(widths, fused, shape.kv_heads))
        given = Place(whole, "input")
    else:
        given = Place(ends(attention, family.query)[0], "input")
        queries, keys, values = (
            Place(ends(attention, name)[1], "output") for name in (family.query, family.key, family.value)
        )
    first, last = ends(attention, family.output)
    return {
        ATTENTION_INPUT: given,
        QUERIES: queries,
        KEYS: keys,
        VALUES: values,
        ATTENDED: Place(first, "input"),
        ATTENTION_OUTPUT: Place(last, "output"),
    }


def _ffn_places(ffn: nn.Module, family: Family, width: int) -> dict[Site, Place]:
    has_module, down = family.ffn is not None, getattr(ffn, family.down)
    fused = family.gate_up
    first = getattr(ffn, fused.name if fused else family.up)
    found = {FFN_INPUT: Place(ffn if has_module else first, "input")}
    if fused:
        found[GATE], found[UP] = (Place(first, "output", select) for select in selections((width, width), fused, 1))
    else:
        if family.gate is not None:
            found[GATE] = Place(getattr(ffn, family.gate), "output")
        found[UP] = Place(first, "output")
    return found | {NEURONS: Place(down, "input"), FFN_OUTPUT: Place(ffn if has_module else down, "output")}


def mixture_of(module: nn.Module, family: Family) -> Any:
    """A layer's module of experts and what belongs to them."""
    assert family.ffn is not None
    return getattr(module, family.ffn)


def _mixture_places(mixture: nn.Module, family: Family) -> dict[Site, Place]:
    """Of what all tokens pass through."""
    names = find_experts(mixture)
    found = {FFN_INPUT: Place(mixture, "input")}
    if names is not None and names.shared is not None:
        shared = getattr(mixture, names.shared)
        if family.gate is not None:
            found[SHARED_GATE] = Place(getattr(shared, family.gate), "output")
        found |= {
            SHARED_UP: Place(getattr(shared, family.up), "output"),
            SHARED_NEURONS: Place(getattr(shared, family.down), "input"),
            SHARED_OUTPUT: Place(shared, "output"),
        }
    return found | {FFN_OUTPUT: Place(mixture, "output")}


def selections(widths: tuple[int, ...], fused: Fused, groups: int) -> list[Select]:
    """What takes each of several outputs out of a fused projection's."""

    def select(number: int) -> Select:
        def of(output: Tensor) -> Tensor:
            if not fused.by_head:
                return output.split(widths, dim=-1)[number]
            by_group = output.unflatten(-1, (groups, -1)).split([width // groups for width in widths], dim=-1)
            return by_group[number].flatten(-2)

        return of

    return [select(number) for number in range(len(widths))]
