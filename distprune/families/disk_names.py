"""What a checkpoint calls the tensors of its language model, by transformers' own rules for loading it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter

from distprune.checkpoint import Checkpoint
from distprune.errors import InputError
from distprune.families.conversion import Conversion, Dims, conversion_of
from distprune.families.fitting import check_fit, check_no_more
from distprune.families.language_model import language_config, language_part, whole_model
from distprune.families.renaming import Loaded, loaded_by

#: Buffers that old checkpoints carry although they are computed when the model is built.
COMPUTED = ("rotary_emb.inv_freq", ".attention.bias", ".attn.bias", ".masked_bias")


@dataclass(frozen=True)
class DiskNames:
    """The names of a checkpoint's tensors, on disk and in the language model's module tree.

    Attributes:
        stored: the name on disk by the name in the module tree, of what is renamed at most. Of two tied to each other
            that are stored once, both have the name of that one.
        conversions: what of the module tree is made of tensors on disk in other ways: experts that lie one by one on
            disk and in one tensor in the module tree.
        carried: what is on disk and has no place in the module tree (vision towers, MTP heads); it goes to the result
            as it is.
    """

    stored: Mapping[str, str]
    conversions: tuple[Conversion, ...] = ()
    carried: tuple[str, ...] = ()

    # ---------------------------------------------------------------- tensors

    def to_disk(self, tensors: Mapping[str, Tensor], config: PreTrainedConfig, first: int = 0) -> dict[str, Tensor]:
        """Tensors as they are stored, by their names on disk, those that pruning has added or made smaller too.

        Args:
            tensors: by their names in the module tree; on the meta device they tell what those on disk look like.
            config: of the model, or of the layer that they are of.
            first: the number of their first expert, where they hold some of a layer's.
        """
        left = dict(tensors)
        result: dict[str, Tensor] = {}
        for conversion in self.conversions_of(tensors):
            result |= conversion.to_disk({name: left.pop(name) for name in conversion.targets}, config, first)
        return {self.on_disk(name): tensor for name, tensor in left.items()} | result

    def from_disk(
        self, tensors: Mapping[str, Tensor], dims: Mapping[str, Dims], config: PreTrainedConfig
    ) -> dict[str, Tensor]:
        """The inverse of :meth:`to_disk`, for tensors of these dimensions by their names in the module tree."""
        made: dict[str, Tensor] = {}
        for conversion in self.conversions_of(dims):
            made |= conversion.from_disk(tensors, dims, config)
        return {name: made[name] if name in made else tensors[self.on_disk(name)] for name in dims}

    def sources_of(self, dims: Mapping[str, Dims], config: PreTrainedConfig) -> dict[str, tuple[str, ...]]:
        """The names on disk of what tensors of these dimensions are read from, by their names in the module tree."""
        found: dict[str, tuple[str, ...]] = {name: (self.on_disk(name),) for name in dims}
        for conversion in self.conversions_of(dims):
            found |= dict.fromkeys(conversion.targets, tuple(conversion.names_on_disk(dims, config)))
        return found

    def conversions_of(self, names: Collection[str]) -> list[Conversion]:
        """What makes tensors of these names in the module tree, and no others.

        Where pruning has left some of what a conversion makes, those are stored as they are, as transformers loads too.
        """
        found = {each.targets: each for name in names if (each := self._made_by.get(name))}
        return [each for each in found.values() if all(target in names for target in each.targets)]

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds what a tensor in the module tree is read from."""
        return name in self.stored or name in self._made_by

    # ---------------------------------------------------------------- names

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

    def carried_in(self, module: str) -> tuple[str, ...]:
        """What is carried of a module in the tree, such as a layer: ``module`` is its name with a dot at the end."""
        prefix = self._modules.get(module)
        return tuple(name for name in self.carried if prefix is not None and name.startswith(prefix))

    def to_json(self) -> dict[str, Any]:
        """What JSON can say of them, for :meth:`from_json`."""
        return {
            "stored": self.stored,
            "conversions": [conversion.to_json() for conversion in self.conversions],
            "carried": self.carried,
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> DiskNames:
        """The names that :meth:`to_json` said."""
        conversions = tuple(map(Conversion.from_json, said["conversions"]))
        return cls(said["stored"], conversions, tuple(said["carried"]))

    @cached_property
    def _made_by(self) -> dict[str, Conversion]:
        return {target: conversion for conversion in self.conversions for target in conversion.targets}

    @cached_property
    def _trees(self) -> dict[str, str]:
        # Of two that are tied, the first is the one that is stored.
        return {disk: tree for tree, disk in reversed(list(self.stored.items()))}

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
        InputError: a tensor that the model needs is missing, has another shape or holds no floating-point numbers;
            there are more experts than it has; the checkpoint is of a larger model that transformers can't build.
    """
    _, is_part = language_config(checkpoint.config)
    is_alone = is_part and type(model.config) is not type(checkpoint.config)
    whole = whole_model(checkpoint.config) if is_alone else model
    tree = model.state_dict()
    place = language_part(whole, model) if is_part else {name: name for name in tree}
    loaded = [*loaded_by(whole, checkpoint.tensors)]
    names = _sorted_out(loaded, place, model.all_tied_weights_keys, checkpoint, tree)
    asked_for = {name: tree[name] for name in (tree if is_alone else place) if not _may_lack(name, names, model)}
    expected = names.to_disk(asked_for, model.config)
    check_fit(checkpoint, expected, _tables(names, model))
    converted = {each.name for each in loaded if each.converter}.difference(names.carried)
    check_no_more(checkpoint, sorted(converted.difference(expected)))
    return names


def _sorted_out(
    loaded: Iterable[Loaded],
    place: Mapping[str, str],
    tied: Mapping[str, str],
    checkpoint: Checkpoint,
    tree: Mapping[str, Tensor],
) -> DiskNames:
    """The names, given those in the language model's module tree by those in the whole model's, and what is tied."""
    stored: dict[str, str] = {}
    carried: list[str] = []
    converted: dict[tuple[str, ...], list[Loaded]] = defaultdict(list)
    converters: dict[tuple[str, ...], WeightConverter] = {}
    for each in loaded:
        ours = tuple(place[target] for target in each.targets if target in place)
        if ours and each.converter:
            _check_can_be_undone(each, ours, checkpoint)
            converted[ours].append(each)
            converters.setdefault(ours, each.converter)
        elif ours and ours[0] not in stored:
            stored[ours[0]] = each.name
        elif each.targets or not each.name.endswith(COMPUTED):
            carried.append(each.name)
    for one, other in (*tied.items(), *((other, one) for one, other in tied.items())):
        if one not in stored and other in stored:  # a tie is symmetric: either may be what is stored
            stored[one] = stored[other]
    conversions = []
    for targets, sources in converted.items():
        conversion = _conversion(converters[targets], sources, targets, checkpoint, tree)
        if conversion.operations:
            conversions.append(conversion)
        else:
            stored[targets[0]] = sources[0].name
    return DiskNames(stored, tuple(conversions), tuple(carried))


def _conversion(
    converter: WeightConverter,
    sources: Sequence[Loaded],
    targets: tuple[str, ...],
    checkpoint: Checkpoint,
    tree: Mapping[str, Tensor],
) -> Conversion:
    found: dict[str, list[str]] = defaultdict(list)
    for each in sources:
        found[each.pattern].append(each.name)
    stored = {each.name: checkpoint.tensors[each.name].shape for each in sources}
    wanted = {target: tuple(tree[target].shape) for target in targets}
    return conversion_of(converter, found, targets, stored, wanted)


def _check_can_be_undone(each: Loaded, ours: tuple[str, ...], checkpoint: Checkpoint) -> None:
    """See that all that a tensor goes into is the language model's."""
    if len(ours) < len(each.targets):
        raise InputError(
            f"{checkpoint.tensors[each.name].file}: transformers makes of tensor '{each.name}' both '{ours[0]}' and "
            "what is not the language model's, so that it can't be written back. Give a release of the language model "
            "alone."
        )


def _may_lack(name: str, names: DiskNames, model: PreTrainedModel) -> bool:
    """Whether transformers does without a tensor on disk of that name in the module tree, and it is not there."""
    if names.has(name):
        return False
    ignored = model._keys_to_ignore_on_load_missing or ()
    return name in model.all_tied_weights_keys or any(re.search(pattern, name) for pattern in ignored)


def _tables(names: DiskNames, model: PreTrainedModel) -> set[str]:
    """The names on disk of what has a row for each token."""
    tables = [table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table]
    return {
        names.on_disk(name)
        for name, parameter in model.named_parameters()
        if any(parameter is table for table in tables)
    }


def _joined(parts: list[str]) -> str:
    return ".".join([*parts, ""]) if parts else ""
