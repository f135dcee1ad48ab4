"""What of a model pruning doesn't know, and carries through as it is."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from distprune.engine.worker.dense_model import DenseModel


@dataclass(frozen=True)
class LeftAlone:
    """Tensors beside the language model, and parts of decoder layers that are of no kind that is known.

    Attributes:
        parts: the parameters of each, by its name: that of a module in some layers, or the first of names on disk.
        share: the fraction of all stored parameters.
    """

    parts: dict[str, int]
    share: float

    def __str__(self) -> str:
        named = ", ".join(self.parts)
        return f"Left alone, and in the result as it was: {named} ({self.share:.1%} of all parameters)."


def left_alone(model: DenseModel) -> LeftAlone:
    """What pruning leaves alone in a model, whatever the method."""
    parts: dict[str, int] = defaultdict(int)
    for name, parameters in (*unknown_sublayers(model), *carried(model)):
        parts[name] += parameters
    everything = sum(math.prod(info.shape) for info in model.checkpoint.tensors.values())
    return LeftAlone(dict(parts), sum(parts.values()) / everything)


def unknown_sublayers(model: DenseModel) -> Iterator[tuple[str, int]]:
    """Modules of layers that belong to no part."""
    architecture = model.architecture
    found: dict[str, list[int]] = defaultdict(list)
    for index in range(architecture.num_layers):
        rest = architecture.rest_tensors(index)
        for module in sorted(architecture.unknown_modules(index)):
            found[module].append(sum(math.prod(dims) for name, dims in rest.items() if name.split(".")[0] == module))
    for module, each in found.items():
        yield f"{module} of {len(each)} layers", sum(each)


def carried(model: DenseModel) -> Iterator[tuple[str, int]]:
    """Tensors on disk that have no place in the language model."""
    for name in model.names.carried:
        prefix = re.split(r"\.\d+\.", name)[0]
        yield ".".join(prefix.split(".")[:2]), math.prod(model.checkpoint.tensors[name].shape)
