"""The language model within a model that also sees or hears: its configuration, and where in the whole it lies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from distprune.errors import InputError


def language_config(config: PreTrainedConfig) -> tuple[PreTrainedConfig, bool]:
    """The language model's configuration, and whether it is a part of the whole model's (vision-language models).

    Of a part, it is a copy that has from the whole what decides there: whether the head is tied, dtype and name.

    Raises:
        InputError: the model has an encoder beside its decoder, or several language models.
    """
    file = Path(config.name_or_path or "", "config.json")
    if config.is_encoder_decoder:
        raise InputError(
            f"{file}: model_type '{config.model_type}' has an encoder beside its decoder. Give a model with a decoder "
            "alone."
        )
    try:
        text = config.get_text_config(decoder=True)
    except ValueError as error:
        raise InputError(f"{file}: has several language models ({error}). Give a model with one.") from error
    if text is config:
        return config, False
    text = copy.deepcopy(text)
    if hasattr(config, "tie_word_embeddings"):
        text.tie_word_embeddings = config.tie_word_embeddings
    text.dtype = text.dtype or config.dtype
    text.name_or_path = config.name_or_path
    return text, True


def whole_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a language model is a part of, on the meta device, by transformers' own class.

    Raises:
        InputError: transformers can't build it.
    """
    own = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            return own._from_config(config) if own else AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # classes ask for packages and for settings, each in its own way
        reason = " ".join(str(error).split()) or type(error).__name__
        file = Path(config.name_or_path or "", "config.json")
        raise InputError(
            f"{file}: transformers can't build the {config.model_type} model that "
            f"the language model is a part of ({reason}). Install what it asks for, or give a release of the language "
            "model alone."
        ) from error


def language_part(whole: PreTrainedModel, language: PreTrainedModel) -> dict[str, str]:
    """Names in the language model's module tree by those in the whole model's; of no others than both have."""
    places = [*_places(whole, language)]
    ours, found = {*language.state_dict()}, {}
    for name in whole.state_dict():
        for there, here in places:
            if name.startswith(there) and (renamed := here + name.removeprefix(there)) in ours:
                found[name] = renamed
    return found


def _places(whole: PreTrainedModel, language: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """The prefixes of the names in the decoder, and in the head, in the one and in the other."""
    decoder = whole.get_decoder()  # of any depth: a class of the language model's, or a part of it
    same = next((each for each in language.modules() if type(each) is type(decoder)), None)
    for there, here in ((decoder, same), (whole.get_output_embeddings(), language.get_output_embeddings())):
        if there is not None and here is not None:
            yield _prefix_of(there, whole), _prefix_of(here, language)


def _prefix_of(module: torch.nn.Module, model: PreTrainedModel) -> str:
    return next(f"{name}." if name else "" for name, each in model.named_modules() if each is module)
