"""What a checkpoint calls the tensors of its language model, by transformers' own rules for loading it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from distprune.checkpoint import Checkpoint
from distprune.errors import InputError
from distprune.families.language_model import language_config, language_part, whole_model

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
    place = language_part(whole, model) if is_part else {name: name for name in model.state_dict()}
    tree = {name: tensor for name, tensor in model.state_dict().items() if is_alone or name in place}
    stored: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    carried = []
    for name, targets, is_converted in loaded_as(whole, checkpoint.tensors):
        ours = [place[target] for target in targets if target in place]
        if ours and not is_converted and ours[0] not in stored:
            stored[ours[0]] = name
        elif targets or not name.endswith(COMPUTED):
            carried.append(name)
            for target in ours if is_converted else ():
                converted.setdefault(target, []).append(name)
    _add_tied(stored, model)
    names = DiskNames(stored, tuple(carried), {name: tuple(parts) for name, parts in converted.items()})
    _check_shapes(names, tree, model, checkpoint)
    return names


def loaded_as(model: PreTrainedModel, names: Iterable[str]) -> Iterator[tuple[str, list[str], bool]]:
    """What transformers makes of each name on disk when it loads a model: names in its module tree, if any.

    The third says whether the tensor is converted too, alone or with others, not only renamed.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    tree, prefix = model.state_dict(), model.base_model_prefix
    for name in sorted(names, key=dot_natural_key):  # the order in which some renamings must see them
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, tree)
        if renamed not in tree and name in tree:
            renamed, pattern = rename_source_key(name, [], [], prefix, tree)
        if pattern is None:
            yield name, [renamed] if renamed in tree else [], False
            continue
        first, *others = converter_of[pattern].target_patterns
        targets = [renamed, *(renamed.replace(first, other) for other in others)]
        yield name, [target for target in targets if target in tree], True


def _add_tied(stored: dict[str, str], model: PreTrainedModel) -> None:
    """Name what is tied and stored once; a tie is symmetric, so that either may be what is stored."""
    for one, other in model.all_tied_weights_keys.items():
        for missing, there in ((one, other), (other, one)):
            if missing not in stored and there in stored:
                stored[missing] = stored[there]


def _check_shapes(names: DiskNames, tree: Mapping[str, Tensor], model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    not_needed = [*(model._keys_to_ignore_on_load_missing or ())]
    expected = {
        names.on_disk(name): tuple(tensor.shape)
        for name, tensor in tree.items()
        if name in names.stored
        or not (name in names.converted or any(re.search(pattern, name) for pattern in not_needed))
    }
    _check_vocabulary(names, model, checkpoint)
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
