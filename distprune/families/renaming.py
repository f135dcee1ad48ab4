"""What transformers makes of the names on disk when it loads a model, by its own code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(frozen=True)
class Loaded:
    """A name on disk, and the names in the module tree of what is made of its tensor: one, several or none.

    Attributes:
        converter: what changes the tensor or joins it with others, and has one target for each of its target patterns;
            None where the tensor is renamed at most.
        pattern: which of the converter's source patterns the name has.
    """

    name: str
    targets: tuple[str, ...]
    converter: WeightConverter | None = None
    pattern: str = ""


def loaded_by(model: PreTrainedModel, names: Iterable[str]) -> Iterator[Loaded]:
    """What becomes of each name on disk when transformers loads the model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    converter_of = {pattern: each for each in converters for pattern in each.source_patterns}
    tree, prefix = model.state_dict(), model.base_model_prefix
    for name in sorted(names, key=dot_natural_key):  # some renamings count on that order
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, tree)
        if renamed not in tree and name in tree:
            renamed, pattern = rename_source_key(name, [], [], prefix, tree)
        if renamed not in tree:
            yield Loaded(name, ())
        elif pattern is None:
            yield Loaded(name, (renamed,))
        else:
            first, *others = converter_of[pattern].target_patterns
            targets = (renamed, *(renamed.replace(first, other) for other in others))
            yield Loaded(name, targets, converter_of[pattern], pattern)
