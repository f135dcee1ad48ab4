"""A model as pruning sees it: the parts and shapes of its layers, found in transformers' own classes.

The model is built on the meta device from its configuration, so nothing of it is in memory but names and shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from distprune.errors import InputError
from distprune.families import TABLES, Family, family_of
from distprune.layers.describing import names_and_shape
from distprune.layers.names import LayerNames
from distprune.layers.parts import Attention, DecoderLayer, Experts, FeedForward
from distprune.layers.removing import find_removable
from distprune.layers.resized import resize_attention, resize_experts, resize_ffn
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape, Removable, ffn_shape_of
from distprune.layers.tree import build_on_meta, find_layers
from distprune.modeling.modeling_pruned import restore_activation

Dims = tuple[int, ...]
#: Where a configuration says what of its layers per-layer configurations can't say.
PRUNED_LAYERS = "pruned_layers"
#: What configurations call the width of an expert, where it is not that of a feed-forward network, that of the network
#: beside the experts, and the number of experts.
EXPERT_WIDTH, SHARED_WIDTH = "moe_intermediate_size", "shared_expert_intermediate_size"
EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "moe_num_experts", "num_experts")


@dataclass(frozen=True)
class _Dense:
    """A layer of the model as its checkpoint holds it.

    Attributes:
        layer: its parts, on the meta device.
        names: what its tensors are called.
        class_shape: the shape that its class has by itself, whatever an earlier pruning has taken.
    """

    layer: DecoderLayer
    names: LayerNames
    class_shape: LayerShape

    @cached_property
    def shape(self) -> LayerShape:
        return self.layer.shape

    @cached_property
    def kind(self) -> Hashable:
        return tuple(dims_of(self.names.state_of(self.layer)).items())


class Architecture:
    """The language model of a configuration.

    Args:
        config: of a causal language model, or of a model that has one in it (``text_config``).

    Raises:
        InputError: transformers has no causal language model of that type, or none of its layers has a part that
            distprune knows.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config = own_config(config)
        self.family: Family = family_of(self.config.model_type)
        self.model: PreTrainedModel = build_on_meta(self.config)
        self.layers_path, layers = find_layers(self.model, self.config.num_hidden_layers)
        self._classes = [type(layer) for layer in layers]
        self._dense = [self._describe(index) for index in range(len(layers))]
        self._removable: dict[Hashable, Removable] = {}
        if all(dense.layer.attention is None and dense.layer.ffn is None for dense in self._dense):
            classes = ", ".join(sorted({layer_class.__name__ for layer_class in self._classes}))
            raise InputError(
                f"model_type '{self.config.model_type}': distprune knows no part of its layers ({classes}), since they "
                f"carry none of the names that it looks for: the common ones, and those of {', '.join(TABLES)}. "
                "docs/families.md says how to add a family."
            )

    # ---------------------------------------------------------------- the model

    @property
    def num_layers(self) -> int:
        return len(self._dense)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """The longest context, in tokens."""
        return self.config.max_position_embeddings

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """What the configuration says that weights are stored in."""
        dtype = self.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    # ---------------------------------------------------------------- layers

    @property
    def dense_shapes(self) -> list[LayerShape]:
        """The shapes of all layers, nothing taken from them yet."""
        return [dense.shape for dense in self._dense]

    def dense_shape(self, index: int) -> LayerShape:
        return self._dense[index].shape

    def class_shape(self, index: int) -> LayerShape:
        """The shape that a layer's class has by itself, whatever an earlier pruning has taken."""
        return self._dense[index].class_shape

    def dense_layer(self, index: int) -> DecoderLayer:
        """A layer's parts, on the meta device."""
        return self._dense[index].layer

    def removable(self, index: int) -> Removable:
        """What of a layer may go."""
        kind = self.kind(index)
        if kind not in self._removable:
            self._removable[kind] = find_removable(self, index)
        return self._removable[kind]

    def kind(self, index: int) -> Hashable:
        """Equal for layers of one class whose tensors have equal names and shapes, and that see as many tokens."""
        return self._classes[index], self._dense[index].kind, self.context(index)

    def context(self, index: int) -> int | None:
        """How many tokens a layer's attention looks at, where it has a sliding window."""
        types = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        return window if window and (types is None or types[index] == "sliding_attention") else None

    def names(self, index: int) -> LayerNames:
        """What a layer's tensors are called in its module."""
        return self._dense[index].names

    def layer_prefix(self, index: int) -> str:
        """What stands before these names in the model's state dict."""
        return f"{self.layers_path}.{index}."

    def layer_class(self, index: int) -> type[nn.Module]:
        """The family's class of a layer."""
        return self._classes[index]

    def layer_config(self, index: int, shape: LayerShape | None = None) -> PreTrainedConfig:
        """The configuration that the class is built from: a layer's own, with the numbers of heads and neurons of a
        shape if one is given."""
        config = self.config
        if getattr(config, "is_heterogeneous", False):
            config = config.per_layer_config[index]
        config = copy.copy(config)
        if shape is not None:
            for name, value in self.config_changes(index, shape).items():
                setattr(config, name, value)
        return config

    def config_changes(self, index: int, shape: LayerShape) -> dict[str, int]:
        """What a layer's configuration says otherwise than the model's, if the layer has that shape."""
        family, dense = self.family, self.dense_shape(index)
        said: dict[str | None, int] = {}
        if shape.attention is not None and dense.attention is not None:
            heads = {family.heads: shape.attention.query_heads, family.kv_heads: shape.attention.kv_heads}
            before = {family.heads: dense.attention.query_heads, family.kv_heads: dense.attention.kv_heads}
            said |= {name: count for name, count in heads.items() if count != before[name]}
            full = self.names(index).full
            if said and full is not None:
                said[family.head_dim] = full.query_key_dim  # else some classes make it anew from the number of heads
        if shape.ffn is not None and dense.ffn is not None and shape.ffn.width != dense.ffn.width:
            said[self.width_field(index)] = shape.ffn.width
        if isinstance(shape.ffn, ExpertsShape) and isinstance(dense.ffn, ExpertsShape):
            shared = shape.ffn.shared_width
            said |= {self.count_field: shape.ffn.count} if shape.ffn.count != dense.ffn.count else {}
            said |= {SHARED_WIDTH: shared} if shared is not None and shared != dense.ffn.shared_width else {}
        return {name: value for name, value in said.items() if name is not None}

    def width_field(self, index: int) -> str:
        """What the configuration calls the width of a layer's feed-forward network, or of each of its experts."""
        has_experts = isinstance(self.dense_shape(index).ffn, ExpertsShape)
        return EXPERT_WIDTH if has_experts and hasattr(self.config, EXPERT_WIDTH) else self.family.width

    def ffn_fields(self, index: int) -> list[str]:
        """All that the configuration says of the shape of a layer's feed-forward network or experts."""
        if not isinstance(self.dense_shape(index).ffn, ExpertsShape):
            return [self.family.width]
        has_shared_width = hasattr(self.config, SHARED_WIDTH)
        return [self.count_field, self.width_field(index), *([SHARED_WIDTH] if has_shared_width else [])]

    @property
    def count_field(self) -> str:
        """What the configuration calls the number of experts."""
        return next(name for name in EXPERT_COUNTS if name in self.config.__dict__)

    def layer_from_state(self, index: int, state: Mapping[str, Tensor]) -> DecoderLayer:
        """A layer of the model from its module's state."""
        dense = self._dense[index]
        pairs = None if dense.layer.attention is None else dense.layer.attention.rotary_pairs
        return dense.names.layer_from_state(state, dense.layer.shape, pairs)

    # ---------------------------------------------------------------- tensors

    def attention_tensors(self, index: int, shape: AttentionShape | None) -> dict[str, Dims]:
        """Names within the layer and dimensions of the tensors of an attention of that shape, its norms included."""
        dense, names = self._dense[index].layer, self.names(index)
        if shape is None or dense.attention is None:
            return {}
        inside = {name: tensor for name, tensor in dense.rest.items() if names.is_in_attention(name)}
        resized = resize_attention(dense.attention, shape)
        return dims_of(names.state_of(DecoderLayer(resized, None, inside)))

    def ffn_tensors(self, index: int, shape: FeedForwardShape | ExpertsShape | None) -> dict[str, Dims]:
        """The same of a feed-forward network, or of a mixture of experts."""
        dense, names = self._dense[index].layer, self.names(index)
        if shape is None or dense.ffn is None:
            return {}
        inside = {name: tensor for name, tensor in dense.rest.items() if names.is_in_mixture(name)}
        return dims_of(names.state_of(DecoderLayer(None, resized_ffn(dense.ffn, shape), inside)))

    def rest_tensors(self, index: int) -> dict[str, Dims]:
        """The same of what no pruning changes."""
        names = self.names(index)
        rest = self._dense[index].layer.rest.items()
        inside = (names.is_in_attention, names.is_in_mixture)
        return dims_of({name: tensor for name, tensor in rest if not any(is_in(name) for is_in in inside)})

    def unknown_modules(self, index: int) -> set[str]:
        """The modules of a layer that have matrices and belong to no part: a mixer, or a router with its experts."""
        shape, family = self.dense_shape(index), self.family
        known = {family.attention if shape.attention else None, family.ffn if shape.ffn else None}
        with_matrices = {name.split(".")[0] for name, dims in self.rest_tensors(index).items() if len(dims) > 1}
        return with_matrices - known

    def layer_tensors(self, index: int, shape: LayerShape) -> dict[str, Dims]:
        """The same of a whole layer."""
        parts = self.attention_tensors(index, shape.attention) | self.ffn_tensors(index, shape.ffn)
        return parts | self.rest_tensors(index)

    def outer_tensors(self) -> dict[str, Dims]:
        """Names in the model's state dict and dimensions of what lies outside the decoder layers: embeddings, final
        norm, and the head unless it is the embedding."""
        state = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if not name.startswith(self.layers_path + ".")
        }
        if self.is_tied:
            state.pop(self.head_name, None)
        return dims_of(state)

    @property
    def embedding_name(self) -> str:
        """The embedding's name in the model's state dict."""
        return self._name_of(self.model.get_input_embeddings())

    @property
    def head_name(self) -> str:
        """The head's."""
        return self._name_of(self.model.get_output_embeddings())

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, each in self.model.named_modules() if each is module) + ".weight"

    def has_plain_heads(self, attention: AttentionShape) -> bool:
        """Whether a plain configuration can have that many heads: as many as before, or such as divide the hidden
        size, which the configurations of some families ask for."""
        before = {shape.attention.query_heads for shape in self.dense_shapes if shape.attention is not None}
        return attention.query_heads in before or self.hidden_size % attention.query_heads == 0

    # ---------------------------------------------------------------- construction

    def _describe(self, index: int) -> _Dense:
        names, shape, state = names_and_shape(self.family, self._classes[index], self.layer_config(index), index)
        base = names.layer_from_state(state, shape)
        said = pruned_layer(self.config, index)
        return _Dense(base if said is None else as_pruned(base, said), names, shape)


def own_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's configuration in transformers' own class, whatever code came with the model."""
    config = config.get_text_config(decoder=True)
    if not type(config).__module__.startswith("transformers."):
        described = config.to_dict()
        described.pop("auto_map", None)
        config = type(AutoConfig.for_model(config.model_type)).from_dict(described)
    config = copy.copy(config)
    restore_activation(config)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"model_type '{config.model_type}' is no causal language model that transformers knows. Give a decoder "
            "model, such as Llama, Qwen3 or Gemma 3."
        )
    return config


def pruned_layer(config: PreTrainedConfig, index: int) -> Mapping[str, Any] | None:
    """What the configuration of a pruned model says of a layer; None of one that is as its class makes it."""
    return (getattr(config, PRUNED_LAYERS, None) or {}).get(str(index))


def as_pruned(base: DecoderLayer, said: Mapping[str, Any]) -> DecoderLayer:
    """A layer of the shape that a pruned model's configuration says."""
    attention, ffn = base.attention, base.ffn
    if attention is not None and "attention" in said:
        attention = said["attention"] and _attention_as_pruned(attention, said["attention"])
    if ffn is not None and "ffn" in said:
        ffn = said["ffn"] and resized_ffn(ffn, ffn_shape_of(said["ffn"]))
    return replace(base, attention=attention, ffn=ffn)


def _attention_as_pruned(attention: Attention, said: Mapping[str, Any]) -> Attention:
    said = dict(said)
    pairs = said.pop("rotary_pairs", None)
    resized = resize_attention(attention, AttentionShape(**said))
    return replace(resized, rotary_pairs=None if pairs is None else torch.tensor(pairs))


def resized_ffn(ffn: FeedForward | Experts, shape: FeedForwardShape | ExpertsShape) -> FeedForward | Experts:
    if isinstance(ffn, Experts) and isinstance(shape, ExpertsShape):
        return resize_experts(ffn, shape)
    assert isinstance(ffn, FeedForward) and isinstance(shape, FeedForwardShape)
    return resize_ffn(ffn, shape)


def dims_of(tensors: Mapping[str, Tensor]) -> dict[str, Dims]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
