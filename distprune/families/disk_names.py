"""What a checkpoint calls the tensors of its language model, by transformers' own rules for loading it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from distprune.checkpoint import Checkpoint
from distprune.errors import InputError
from distprune.families.language_model import language_config, language_part, whole_model
from distprune.families.renaming import Loaded, loaded_by

#: Buffers that old checkpoints carry although they are computed when the model is built.
COMPUTED = ("rotary_emb.inv_freq", ".attention.bias", ".attn.bias", ".masked_bias")


@dataclass(frozen=True)
class DiskNames:
    """The names of a checkpoint's tensors, on disk and in the language model's module tree.

    Attributes:
        stored: the name on disk by the name in the module tree. Of two tied to each other that are stored once, both
            have the name of that one.
        carried: what is on disk and has no place of its own in the module tree (vision towers, MTP heads, what is
            converted); it goes to the result as it is.
        converted: names on disk, all of them carried, by the name in the module tree of what transformers makes of
            them: experts that lie one by one on disk and in one tensor in the module tree.
    """

    stored: Mapping[str, str]
    carried: tuple[str, ...] = ()
    converted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def on_disk(self, name: str) -> str:
        """The name on disk of a tensor in the module tree, of one that pruning adds too.

        One that was not there has the name that its nearest neighbours' names lead to.
        """
        if name in self.stored:
            return self.stored[name]
        parts = name.split(".")
        for end in range(len(parts) - 1, -1, -1):
            module = _joined(parts[:end])
            if module in self._modules:
                return self._modules[module] + ".".join(parts[end:])
        return name

    def in_module(self, name: str) -> str | None:
        """The name in the module tree of a tensor on disk, None for one that is carried."""
        return self._trees.get(name)

    def to_json(self) -> dict[str, Any]:
        """What JSON can say of them, for :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> DiskNames:
        """The names that :meth:`to_json` said."""
        converted = {name: tuple(parts) for name, parts in said["converted"].items()}
        return cls(said["stored"], tuple(said["carried"]), converted)

    @cached_property
    def _trees(self) -> dict[str, str]:
        # Of two that are tied, the first is the one that is stored.
        return {disk: tree for tree, disk in reversed(self.stored.items())}

    @cached_property
    def _modules(self) -> dict[str, str]:
        """The prefixes on disk of the names in a module, by those in the tree."""
        found: dict[str, str] = {}
        for tree, disk in self.stored.items():
            here, there = tree.split("."), disk.split(".")
            while here and there and here.pop() == there.pop():
                found.setdefault(_joined(here), _joined(there))
        return found


def disk_names(model: PreTrainedModel, checkpoint: Checkpoint) -> DiskNames:
    """What the checkpoint calls the tensors of its language model.

    Args:
        model: transformers' causal language model on the meta device, built from the ``language_config`` of the
            checkpoint's configuration; or the whole model that it is a part of, where the part has no class of its own.
        checkpoint: its headers.

    Raises:
        InputError: a tensor that the model needs is missing or has another shape; the checkpoint is of a larger model
            that transformers can't build.
    """
    _, is_part = language_config(checkpoint.config)
    is_alone = is_part and type(model.config) is not type(checkpoint.config)
    whole = whole_model(checkpoint.config) if is_alone else model
    tree = model.state_dict()
    place = language_part(whole, model) if is_part else {name: name for name in tree}
    names = _sorted_out(loaded_by(whole, checkpoint.tensors), place, model.all_tied_weights_keys)
    _check_vocabulary(names, model, checkpoint)
    needed = tree if is_alone else place
    _check_shapes(names, {name: tree[name] for name in needed}, model, checkpoint)
    return names


def _sorted_out(loaded: Iterable[Loaded], place: Mapping[str, str], tied: Mapping[str, str]) -> DiskNames:
    """The names, given those in the language model's module tree by those in the whole model's, and what is tied."""
    stored: dict[str, str] = {}
    converted: dict[str, tuple[str, ...]] = {}
    carried: list[str] = []
    for each in loaded:
        ours = [place[target] for target in each.targets if target in place]
        if ours and not each.is_converted and ours[0] not in stored:
            stored[ours[0]] = each.name
        elif each.targets or not each.name.endswith(COMPUTED):
            carried.append(each.name)
            for target in ours if each.is_converted else ():
                converted[target] = (*converted.get(target, ()), each.name)
    for one, other in (*tied.items(), *((other, one) for one, other in tied.items())):
        if one not in stored and other in stored:  # a tie is symmetric: either may be what is stored
            stored[one] = stored[other]
    return DiskNames(stored, tuple(carried), converted)


def _check_shapes(names: DiskNames, tree: Mapping[str, Tensor], model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    not_needed = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    elsewhere = {*names.converted, *model.all_tied_weights_keys}
    expected = {
        names.on_disk(name): tuple(tensor.shape)
        for name, tensor in tree.items()
        if name in names.stored or not (name in elsewhere or any(each.search(name) for each in not_needed))
    }
    checkpoint.check_shapes(expected)


def _check_vocabulary(names: DiskNames, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse embeddings that were padded, or grew, without a word of it in config.json, as transformers does."""
    tables = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table}
    for name, parameter in model.named_parameters():
        info = checkpoint.tensors.get(names.stored.get(name, ""))
        if id(parameter) in tables and info and info.shape[1:] == parameter.shape[1:] and info.shape != parameter.shape:
            raise InputError(
                f"{info.file}: tensor {names.stored[name]} has {info.shape[0]} rows, and config.json a vocab_size of "
                f"{parameter.shape[0]}, with which transformers doesn't load it either. Set vocab_size to "
                f"{info.shape[0]} in {checkpoint.path}/config.json, or resize the model with resize_token_embeddings."
            )


def _joined(parts: list[str]) -> str:
    return ".".join([*parts, ""]) if parts else ""
