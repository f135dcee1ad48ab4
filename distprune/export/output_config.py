"""The layouts of pruned checkpoints: what their config.json says, and the code that lies beside it.

``stock`` is the family's plain configuration, for layers of one shape. ``heterogeneous`` has transformers'
``per_layer_config``, for layers that have numbers of heads and neurons of their own and nothing else. ``free`` says
besides the shapes of layers that have factors, branches, narrower values and keys or biases of their own, or that lack
a part. All keep the base's ``model_type``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

import distprune.modeling
from distprune.export.layer_fields import fields_by_layer, is_even, write_fields
from distprune.export.said_shapes import Said, beyond_configuration, shape_of
from distprune.layers.architecture import PRUNED_LAYERS, Architecture
from distprune.layers.module import family_names
from distprune.modeling.modeling_pruned import hide_activation, restore_activation

Layout = Literal["stock", "heterogeneous", "free"]

PRUNED_NAMES = "pruned_names"
CODE = ("modeling_pruned.py", "pruned_layers.py", "pruned_attention.py", "pruned_projections.py")
#: The last that knows a configuration is what the model is opened with.
AUTO_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText)
#: What the base's configuration says of the base's own files.
OF_THE_BASE = ("quantization_config", "auto_map")


def output_config(
    architecture: Architecture, whole: PreTrainedConfig, layers: Sequence[Said], layout: Layout
) -> dict[str, Any]:
    """What config.json says of a pruned model.

    Args:
        architecture: of the model that was pruned, dense or pruned itself.
        whole: the base's configuration, of which the architecture's is all or a part.
        layers: the shape of each layer, as :func:`distprune.layers.module.said_shape` gives it.
        layout: one that can say these shapes; see :func:`plainest_layout`.

    Raises:
        ValueError: the layout can't say them.
    """
    config = plain_copy(whole)
    text = config.get_text_config(decoder=True)
    write_fields(text, fields_by_layer(architecture, layers), is_even=layout == "stock")
    if shapes := beyond_configuration(architecture, layers):
        if layout != "free":
            raise ValueError(f"Layer {min(shapes, key=int)} has a shape that the layout {layout} can't say.")
        setattr(text, PRUNED_LAYERS, shapes)
        setattr(text, PRUNED_NAMES, family_names(architecture.family))
        hide_activation(text)
    name_classes(config, "" if layout == "stock" else "Pruned")
    return json.loads(config.to_json_string())


def modeling_files(layout: Layout) -> dict[str, str]:
    """The code that lies beside config.json, by file name."""
    if layout == "stock":
        return {}
    folder = Path(distprune.modeling.__file__).parent
    return {name: (folder / name).read_text(encoding="utf-8") for name in CODE}


def plainest_layout(architecture: Architecture, layers: Sequence[Said]) -> Layout:
    """Of the layouts that can say the layers' shapes the one that most programs open."""
    if beyond_configuration(architecture, layers):
        return "free"
    attentions = [shape.attention for shape in map(shape_of, layers) if shape.attention is not None]
    is_plain = all(architecture.has_plain_heads(attention) for attention in attentions)
    return "stock" if is_plain and is_even(fields_by_layer(architecture, layers)) else "heterogeneous"


def plain_copy(whole: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a configuration without what an earlier pruning or the base's files had it say."""
    config = copy.deepcopy(whole)
    text = config.get_text_config(decoder=True)
    restore_activation(text)
    for each in (config, text):
        for name in (*OF_THE_BASE, PRUNED_LAYERS, PRUNED_NAMES):
            each.__dict__.pop(name, None)
    return config


def name_classes(config: PreTrainedConfig, prefix: str) -> None:
    """Write the classes that open the model: transformers' own, or those of the code beside it with a prefix."""
    kind = type(config)
    classes = {
        auto.__name__: auto._model_mapping[kind].__name__ for auto in AUTO_CLASSES if kind in auto._model_mapping
    }
    *_, architecture = classes.values()
    config.architectures = [prefix + architecture]
    if prefix:
        config.auto_map = {auto: f"modeling_pruned.{prefix}{name}" for auto, name in classes.items()}
