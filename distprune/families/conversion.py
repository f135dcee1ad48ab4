"""Tensors that transformers changes or joins when it loads a model, and parts again when it saves one.

Most mixtures of experts are of this kind: on disk lies one tensor an expert, in the module tree one for all of them.
What is done to the tensors, either way, is transformers' own code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, core_model_loading
from transformers.core_model_loading import Chunk, ConversionOps, Transpose, WeightConverter

Dims = tuple[int, ...]
#: Stands in a name on disk for the number of an expert.
NUMBER = "*"
# Earlier versions of transformers part everything into equal pieces.
Split: Any = getattr(core_model_loading, "Split", Chunk)


@dataclass(frozen=True)
class Operation:
    """One of transformers' operations on tensors: its class in ``core_model_loading``, and what it is made with."""

    name: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, operation: ConversionOps) -> Operation:
        return cls(type(operation).__name__, dict(vars(operation)))

    def build(self) -> ConversionOps:
        return getattr(core_model_loading, self.name)(**self.settings)


@dataclass(frozen=True)
class Conversion:
    """Tensors in the module tree that are made of others on disk, such as the up projections of a layer's experts.

    Attributes:
        sources: names on disk, one for each of ``source_patterns``, with a ``*`` where one tensor an expert is stored.
        targets: names in the module tree, one for each of ``target_patterns``.
        source_patterns, target_patterns, operations: those of transformers' ``WeightConverter``.
        unequal: dimensions of the sources where these differ, so that what is made of them doesn't tell where to part
            it; empty where they are alike. No pruning changes such tensors.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_patterns: tuple[str, ...]
    target_patterns: tuple[str, ...]
    operations: tuple[Operation, ...]
    unequal: tuple[Dims, ...] = ()

    def to_disk(self, tensors: Mapping[str, Tensor], config: PreTrainedConfig, first: int = 0) -> dict[str, Tensor]:
        """The tensors on disk that the targets are stored as, by their names there.

        Args:
            tensors: the targets, by their names in the module tree. They may have fewer experts, or be narrower, than
                those that the checkpoint holds; on the meta device they tell what the tensors on disk look like.
            config: of the layer that they are of.
            first: the number of their first expert, where they hold some of a layer's.
        """
        converter: Any = self._converter.reverse_transform()
        sources: dict[str, Tensor] = {}
        if self.unequal:
            converter.operations = [
                Split(each.dim) if isinstance(each, Chunk) else each for each in converter.operations
            ]
            sources = dict(zip(converter.target_patterns, map(_imagined, self.unequal), strict=True))
        given = [(p, tensors[target]) for p, target in zip(converter.source_patterns, self.targets, strict=True)]
        made = _converted(converter, given, sources, config)
        result = {}
        for pattern, source in zip(converter.target_patterns, self.sources, strict=True):
            for number in range(len(made)) if NUMBER in pattern else [0]:
                if (tensor := made.get(pattern.replace(NUMBER, str(number)))) is not None:
                    result[source.replace(NUMBER, str(first + number))] = tensor
        return result

    def from_disk(
        self, tensors: Mapping[str, Tensor], dims: Mapping[str, Dims], config: PreTrainedConfig, first: int = 0
    ) -> dict[str, Tensor]:
        """The inverse of :meth:`to_disk`, for targets of these dimensions; it takes its own out of ``tensors``."""
        converter = self._converter
        found = [
            (pattern, tensors[name])
            for pattern, source in zip(converter.source_patterns, self.sources, strict=True)
            for name in _numbered(source, tensors, first)
        ]
        dtype = reduce(torch.promote_types, {tensor.dtype for _, tensor in found})
        given = [(pattern, tensor.to(dtype)) for pattern, tensor in found]
        wanted = {
            pattern: _imagined(dims[target], dtype)
            for pattern, target in zip(converter.target_patterns, self.targets, strict=True)
        }
        made = _converted(converter, given, wanted, config)
        return {target: made[pattern] for pattern, target in zip(converter.target_patterns, self.targets, strict=True)}

    def names_on_disk(self, dims: Mapping[str, Dims], config: PreTrainedConfig) -> list[str]:
        """What targets of these dimensions are stored as."""
        return [*self.to_disk({name: _imagined(dims[name]) for name in self.targets}, config)]

    @cached_property
    def keeps_experts_apart(self) -> bool:
        """Whether what is made of some experts' tensors is those experts' part, along the first dimension, of what is
        made of all experts' tensors."""
        return len(self.targets) == 1 and all(map(_is_done_to_each_expert, self.operations))

    @property
    def _converter(self) -> WeightConverter:
        operations = [operation.build() for operation in self.operations]
        return WeightConverter(list(self.source_patterns), list(self.target_patterns), operations)

    # ---------------------------------------------------------------- as text

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Conversion:
        said = {name: tuple(value) for name, value in said.items()}
        operations = tuple(Operation(**each) for each in said["operations"])
        return cls(**said | {"operations": operations, "unequal": tuple(map(tuple, said["unequal"]))})


def conversion_of(
    converter: WeightConverter,
    found: Mapping[str, Sequence[str]],
    targets: Sequence[str],
    stored: Mapping[str, Dims],
    wanted: Mapping[str, Dims],
) -> Conversion:
    """What a converter does to the tensors of a checkpoint that it makes some targets of.

    Args:
        converter: transformers' own.
        found: the names on disk by the source pattern that they have.
        targets: names in the module tree, one for each target pattern.
        stored: dimensions by names on disk.
        wanted: dimensions by names in the module tree.
    """
    dims = [stored[name] for pattern in converter.source_patterns for name in found.get(pattern, ())]
    made = [wanted[target] for target in targets]
    fits = {*dims} == {*made}
    operations = [each for each in converter.operations if not (fits and _may_be_left_out(each))]
    return Conversion(
        _sources(converter.source_patterns, found),
        tuple(targets),
        tuple(converter._original_source_patterns),
        tuple(converter._original_target_patterns),
        tuple(map(_settled, operations)),
        tuple(dims) if _are_unequal_parts(dims, converter.source_patterns, made) else (),
    )


def _sources(patterns: Sequence[str], found: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The names on disk of what has the patterns. Of what is missing, the name is as its neighbours' are."""
    known = {pattern: _with_star(pattern, found[pattern][0]) for pattern in patterns if pattern in found}
    [pattern, name] = next(iter(known.items()))
    prefix = name.removesuffix(_literal(pattern))
    return tuple(known.get(pattern, prefix + _literal(pattern)) for pattern in patterns)


def _with_star(pattern: str, name: str) -> str:
    """A name with a ``*`` where the pattern has one."""
    if NUMBER not in pattern:
        return name
    parts = name.split(".")
    place = -1 - pattern.rpartition(NUMBER)[2].count(".")
    parts[place] = re.sub(r"\d+$", NUMBER, parts[place])
    return ".".join(parts)


def _literal(pattern: str) -> str:
    return pattern.replace("\\", "")


def _may_be_left_out(operation: ConversionOps) -> bool:
    """Whether an operation does nothing to what has the wanted dimensions already."""
    return isinstance(operation, Transpose) and operation.check_dims


def _settled(operation: ConversionOps) -> Operation:
    """The operation, which is known to do something: both ways, whatever the dimensions."""
    said = Operation.of(operation)
    return Operation(said.name, {**said.settings, "check_dims": False}) if _may_be_left_out(operation) else said


def _are_unequal_parts(dims: Sequence[Dims], patterns: Sequence[str], made: Sequence[Dims]) -> bool:
    """Whether tensors, one for each pattern, differ in size and are together what is made of them."""
    are_all = len(made) == 1 and len(dims) == len(patterns) and sum(map(math.prod, dims)) == math.prod(made[0])
    return are_all and len({*dims}) > 1


def _is_done_to_each_expert(operation: Operation) -> bool:
    along = {operation.settings[name] for name in ("dim", "dim0", "dim1") if name in operation.settings}
    if operation.name == "MergeModulelist":
        return along == {0}
    return bool(along) and 0 not in along


def _numbered(source: str, tensors: Mapping[str, Tensor], first: int) -> list[str]:
    """The names on disk, in order, of what is there of a source."""
    if NUMBER not in source:
        return [source] if source in tensors else []
    names = (source.replace(NUMBER, str(number)) for number in count(first))
    return [*takewhile(tensors.__contains__, names)]


def _imagined(dims: Dims, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(dims, dtype=dtype, device="meta")


class _Parameters:
    """What operations ask a model for: the parameters that they make, on the meta device."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def get_parameter(self, name: str) -> Tensor:
        return self._tensors[name]


def _converted(
    converter: Any, given: Iterable[tuple[str, Tensor]], wanted: Mapping[str, Tensor], config: PreTrainedConfig
) -> dict[str, Tensor]:
    """What a converter makes of tensors with its source patterns: by its target patterns, stars replaced by numbers."""
    for pattern, tensor in given:
        converter.add_tensor(pattern, pattern, pattern, tensor)
    made = converter.convert(converter.target_patterns[0], model=_Parameters(wanted), config=config)
    return {pattern: each[0] if isinstance(each, list) else each for pattern, each in made.items()}
