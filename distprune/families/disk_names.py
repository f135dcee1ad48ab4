"""What a checkpoint calls the tensors of its language model, by transformers' own rules for loading it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from distprune.checkpoint import Checkpoint
from distprune.families.fitting import check_fit
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

    def carried_in(self, module: str) -> tuple[str, ...]:
        """What is carried of a module in the tree, such as a layer: ``module`` is its name with a dot at the end."""
        prefix = self._modules.get(module)
        return tuple(name for name in self.carried if prefix is not None and name.startswith(prefix))

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
        InputError: a tensor that the model needs is missing, has another shape or holds no floating-point numbers; the
            checkpoint is of a larger model that transformers can't build.
    """
    _, is_part = language_config(checkpoint.config)
    is_alone = is_part and type(model.config) is not type(checkpoint.config)
    whole = whole_model(checkpoint.config) if is_alone else model
    tree = model.state_dict()
    place = language_part(whole, model) if is_part else {name: name for name in tree}
    names = _sorted_out(loaded_by(whole, checkpoint.tensors), place, model.all_tied_weights_keys)
    asked_for = {name: tree[name] for name in (tree if is_alone else place) if not _may_lack(name, names, model)}
    check_fit(checkpoint, {names.on_disk(name): tensor for name, tensor in asked_for.items()}, _tables(names, model))
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


def _may_lack(name: str, names: DiskNames, model: PreTrainedModel) -> bool:
    """Whether transformers does without a tensor on disk of that name in the module tree, and it is not there."""
    if name in names.stored:
        return False
    ignored = model._keys_to_ignore_on_load_missing or ()
    elsewhere = name in names.converted or name in model.all_tied_weights_keys
    return elsewhere or any(re.search(pattern, name) for pattern in ignored)


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
