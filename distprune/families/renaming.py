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

    ``is_converted`` where the tensor is changed, or joined with others; otherwise it is renamed at most.
    """

    name: str
    targets: tuple[str, ...]
    is_converted: bool = False


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
        targets = [renamed]
        if pattern is not None:
            first, *others = converter_of[pattern].target_patterns
            targets += [renamed.replace(first, other) for other in others]
        yield Loaded(name, tuple(target for target in targets if target in tree), pattern is not None)
