"""Opening pruned checkpoints with the classes of this package, whatever code lies in their folders."""

from __future__ import annotations

from functools import partial
from os import PathLike
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from distprune.modeling import modeling_pruned

MODULE = modeling_pruned.__name__.rpartition(".")[2]


def load(model: str | PathLike, **options: Any) -> PreTrainedModel:
    """The model of a checkpoint in any layout, without ``trust_remote_code``.

    Args:
        model: a folder, or a name on the Hugging Face Hub.
        options: of ``from_pretrained``, such as ``dtype`` or ``device_map``.
    """
    of_hub = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    config = options.pop("config", None) or AutoConfig.from_pretrained(model, **of_hub)
    return class_of(config).from_pretrained(model, config=config, **options)


def without_weights(config: Any, **options: Any) -> PreTrainedModel:
    """A model of a checkpoint's configuration, its weights as they happen to be: for the meta device."""
    opener = class_of(config)
    make = opener._from_config if issubclass(opener, PreTrainedModel) else partial(opener.from_config, **options)
    return make(config)


def class_of(config: Any) -> type:
    """What opens a model of that configuration: a class of this package, or transformers' own."""
    auto_map = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        module, _, name = auto_map.get(auto.__name__, "").rpartition("--")[2].partition(".")
        if module == MODULE:
            return getattr(modeling_pruned, name)
        if not auto_map and type(config) in auto._model_mapping:
            return auto
    return AutoModelForCausalLM
