"""A model of a family's own class, its decoder layers changed to what pruning has left of them.

This file travels inside checkpoints, so it imports torch, transformers and the files beside it alone. Its classes have
the names of transformers' with `Pruned` before them, and are made when they are asked for: `PrunedLlamaForCausalLM` is
transformers' `LlamaForCausalLM` with :class:`Pruned` before it.

What the configuration says of layers beyond the original's fields:

- `per_layer_config`, of transformers' own: numbers of heads and neurons, for layers that have others than the rest.
- `pruned_layers`: by the number of a layer its whole shape, where no configuration of the family could say it.
- `pruned_names`: what the family calls its projections; see `reshape_layer`.
- `pruned_hidden_act` and the like: the activation, where in its place there is what :data:`NEEDS_CODE` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .pruned_layers import reshape_layer

#: What configurations of families call the activation of their feed-forward networks.
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
#: Stands for the activation's name where the family's own class would build layers with random weights in the place of
#: what it doesn't know. So that class ends with an error that says this.
NEEDS_CODE = "of a model pruned by distprune: open it with trust_remote_code=True, or with distprune.load"
#: Before the name of a field whose value is kept apart.
KEPT = "pruned_"


def hide_activation(config: PreTrainedConfig) -> None:
    """Put in the activation's place what says that the model needs this code."""
    for name in ACTIVATIONS:
        if (activation := getattr(config, name, None)) is not None:
            setattr(config, KEPT + name, activation)
            setattr(config, name, NEEDS_CODE)


def restore_activation(config: PreTrainedConfig) -> None:
    """Undo it; a configuration that says its activation stays as it is."""
    for name in ACTIVATIONS:
        if (activation := config.__dict__.pop(KEPT + name, None)) is not None:
            setattr(config, name, activation)


@contextmanager
def real_activation(config: PreTrainedConfig) -> Iterator[None]:
    """While open, a configuration says its activation."""
    is_hidden = any(KEPT + name in config.__dict__ for name in ACTIVATIONS)
    restore_activation(config)
    try:
        yield
    finally:
        if is_hidden:
            hide_activation(config)


#: By the end of a class's name the Auto class that opens it.
AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "": "AutoModel",
}


class Pruned:
    """A mixin of transformers' model classes: layers are as their own configurations and shapes say."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        text = config.get_text_config(decoder=True)
        if any(shape.get("attention") for shape in (getattr(text, "pruned_layers", None) or {}).values()):
            # Shards of heads don't fit what stands in for projections, so every device gets all.
            text.base_model_tp_plan = None
        with real_activation(text):
            super().__init__(config, *args, **kwargs)
            prune_layers(self.get_decoder())
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        # Of the original only its layers are changed: it is initialized, and its tensors are named, as the original.
        return False

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        decoder = self.get_decoder()
        for module in decoder_layers(decoder).modules():
            if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
                config._attn_implementation = decoder.config._attn_implementation

    def _get_static_cache_init_shape(self) -> None:
        # Layers cache what pruning has left of keys and values, so each makes room when it first has some.
        return None


def prune_layers(decoder: nn.Module) -> None:
    """Change a decoder's layers to their own configurations and shapes."""
    config = decoder.config
    shapes = getattr(config, "pruned_layers", None) or {}
    layers = decoder_layers(decoder)
    for index, layer in enumerate(layers):
        if differs(config, index):
            layers[index] = layer = type(layer)(config.per_layer_config[index], index)
        if str(index) in shapes:
            reshape_layer(layer, config.pruned_names, shapes[str(index)], index)


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """A decoder's layers: the first list of so many modules."""
    count = decoder.config.num_hidden_layers
    return next(each for each in decoder.modules() if isinstance(each, nn.ModuleList) and len(each) == count)


def differs(config: PreTrainedConfig, index: int) -> bool:
    """Whether a layer's own configuration says something else than the model's."""
    names = getattr(config, "per_layer_attributes", None) or ()
    own = config.per_layer_config[index] if names else config
    return any(getattr(own, name, None) != getattr(config, name, None) for name in names)


def __getattr__(name: str) -> type:
    """The class of a name in this module: see the module's docstring."""
    original = getattr(transformers, name.removeprefix("Pruned"), None)
    if not name.startswith("Pruned") or not isinstance(original, type):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    made = type(name, (Pruned, original), {"__module__": __name__, "__doc__": f"A pruned {original.__name__}."})
    # So that `save_pretrained` writes this file, and the ones that it imports, beside the weights.
    made._auto_class = next(auto for end, auto in AUTO_CLASSES.items() if name.endswith(end))
    # So that tensors are stored under the names that the original's are.
    if renamed := get_checkpoint_conversion_mapping(original.__name__):
        register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
    return globals().setdefault(name, made)
