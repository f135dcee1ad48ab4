"""The file of a model's latencies: the seconds that each part of its layers took on one device, by the part's shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from upath import UPath

from distprune.errors import InputError
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape

#: Of a workload each, or of one for each workload.
Seconds = NDArray[np.float64]
#: What is narrower than the dense one has other modules in it, so that times between the two are on no line.
NARROWED = ("value_dim", "query_key_dim")
ATTENTION_RANKS = ("query_rank", "key_rank", "output_rank")
NANOSECONDS = 1e9
AGAIN = "Measure again, with `distprune measure-latency`"


class Strict(BaseModel):
    """What a table is made of: nothing in it is unknown, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Workload(Strict):
    """Something that the model is to do, once for all sequences of a batch."""

    kind: Literal["prefill", "decode"] = Field(description="read a prompt, or make one more token")
    batch: int = Field(ge=1, description="sequences at a time")
    tokens: int = Field(ge=1, description="of each sequence: those of the prompt, or those before the new one")
    weight: float = Field(ge=0, allow_inf_nan=False, description="how often the budgeted sum has its seconds")


class Grid(Strict):
    """Seconds at the points of a grid."""

    axes: dict[str, list[int]] = Field(description="by a field of the shape, at which of its values, ascending")
    seconds: list[Any] = Field(description="of each workload, and then along each axis")

    @model_validator(mode="after")
    def _fits(self) -> Grid:
        for name, nodes in self.axes.items():
            if not nodes or any(one >= other for one, other in pairwise(nodes)):
                raise ValueError(f"the values of {name} must ascend")
        try:
            array = np.asarray(self.seconds, dtype=np.float64)
        except (ValueError, TypeError):
            raise ValueError("seconds must be numbers, as many along each axis") from None
        if array.shape[1:] != tuple(map(len, self.axes.values())) or array.ndim != 1 + len(self.axes):
            raise ValueError(f"seconds of shape {array.shape} do not fit the axes {', '.join(self.axes) or '(none)'}")
        if not np.isfinite(array).all():
            raise ValueError("seconds must be finite")
        return self

    @classmethod
    def of(cls, axes: Mapping[str, list[int]], seconds: Seconds) -> Grid:
        """The grid of an array (workloads, values of the first axis, ..)."""
        return cls(axes=dict(axes), seconds=seconds.tolist())

    @property
    def array(self) -> Seconds:
        """The seconds, (workloads, values of the first axis, ..)."""
        return np.asarray(self.seconds, dtype=np.float64)

    def at(self, shape: Mapping[str, Any]) -> Seconds:
        """The seconds of each workload at a shape, linear between the points and constant beyond the last."""
        found = self.array
        for name, nodes in reversed(self.axes.items()):
            value = shape[name]
            if name in NARROWED and len(nodes) > 1 and value < nodes[-1]:
                value = min(value, nodes[-2])
            place = float(np.interp(value, nodes, np.arange(len(nodes))))
            low = min(int(place), max(0, len(nodes) - 2))
            high = min(low + 1, len(nodes) - 1)
            found = found[..., low] + (place - low) * (found[..., high] - found[..., low])
        return found


class KindLatencies(Strict):
    """Latencies of all layers of one kind. What can't go from such a layer has no grid, and belongs to the rest.

    Ranks have seconds that are to be added to those of the part without factors or branch; they may be negative.
    """

    shape: dict[str, Any] = Field(description="of the dense layer")
    rest: Grid = Field(description="norms, residual additions, and what can't go")
    attention: Grid | None = None
    query_rank: Grid | None = None
    key_rank: Grid | None = None
    output_rank: Grid | None = None
    ffn: Grid | None = None
    branch_rank: Grid | None = None

    @property
    def grids(self) -> list[Grid]:
        return [grid for grid in vars(self).values() if isinstance(grid, Grid)]

    def seconds(self, shape: LayerShape) -> Seconds:
        """What a layer of a shape takes, of each workload."""
        return self.rest.at({}) + self.attention_seconds(shape.attention) + self.ffn_seconds(shape.ffn)

    def attention_seconds(self, shape: AttentionShape | None) -> Seconds:
        """What attention of a shape adds to the rest, of each workload."""
        return self._added("attention", ATTENTION_RANKS, shape)

    def ffn_seconds(self, shape: FeedForwardShape | ExpertsShape | None) -> Seconds:
        """What a feed-forward network of a shape adds to the rest, of each workload."""
        assert not isinstance(shape, ExpertsShape)
        return self._added("ffn", ("branch_rank",), shape)

    def _added(self, part: str, ranks: tuple[str, ...], shape: AttentionShape | FeedForwardShape | None) -> Seconds:
        nothing = np.zeros(len(self.rest.array))
        if shape is None:
            return nothing
        fields = asdict(shape)
        grids = [getattr(self, name) for name in (part, *(rank for rank in ranks if fields[rank] is not None))]
        return np.maximum(sum((grid.at(fields) for grid in grids if grid), nothing), 0)


class LatencyTable(Strict):
    """What was measured of a model's decoder layers on one device."""

    version: Literal[1] = Field(default=1, description="of the file's layout")
    model_type: str
    hidden_size: int
    device: str = Field(description="its name")
    dtype: str
    threads: int = Field(description="of the CPU")
    torch: str = Field(description="its version")
    workloads: list[Workload] = Field(min_length=1)
    layers: list[int] = Field(min_length=1, description="of which of the kinds each layer is")
    kinds: list[KindLatencies] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> LatencyTable:
        if not all(0 <= kind < len(self.kinds) for kind in self.layers):
            raise ValueError(f"layers must be numbers of the {len(self.kinds)} kinds")
        if any(len(grid.array) != len(self.workloads) for kind in self.kinds for grid in kind.grids):
            raise ValueError(f"every grid needs the seconds of {len(self.workloads)} workloads")
        if not sum(workload.weight for workload in self.workloads):
            raise ValueError("a workload needs a weight above 0")
        return self

    # ---------------------------------------------------------------- seconds

    def kind(self, index: int) -> KindLatencies:
        """The latencies of a layer."""
        return self.kinds[self.layers[index]]

    def layer_seconds(self, index: int, shape: LayerShape) -> Seconds:
        """What a layer of a shape takes, of each workload."""
        return self.kind(index).seconds(shape)

    # ---------------------------------------------------------------- weighted sums over the workloads

    def attention_nanoseconds(self, index: int, shape: AttentionShape | None) -> int:
        """What attention of a shape adds to a layer's rest."""
        return self._nanoseconds(self.kind(index).attention_seconds(shape))

    def ffn_nanoseconds(self, index: int, shape: FeedForwardShape | ExpertsShape | None) -> int:
        """What a feed-forward network of a shape adds to a layer's rest."""
        return self._nanoseconds(self.kind(index).ffn_seconds(shape))

    def rest_nanoseconds(self, index: int) -> int:
        """What a layer takes without its parts."""
        return self._nanoseconds(self.kind(index).rest.at({}))

    def _nanoseconds(self, seconds: Seconds) -> int:
        weights = np.array([workload.weight for workload in self.workloads])
        return round(NANOSECONDS * float(weights @ seconds))

    # ---------------------------------------------------------------- the file

    @property
    def conditions(self) -> str:
        """Where it was measured, for people."""
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.device}, {self.dtype}, {threads}"

    @property
    def fingerprint(self) -> str:
        """A digest of all that the table says."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @classmethod
    def read(cls, file: Path | UPath) -> LatencyTable:
        """The table in a file.

        Raises:
            InputError: there is none, or what is there is none.
        """
        try:
            said = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{file}: no such latency table. Make it with `distprune measure-latency`.") from None
        except OSError as error:
            raise InputError(f"{file}: can't be read ({error.strerror or error}). Check --latency-table.") from None
        except ValueError as error:
            raise InputError(f"{file}: is not valid JSON ({error}). {AGAIN}.") from None
        try:
            return cls.model_validate(said)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the file"
            raise InputError(f"{file}: is no latency table: {where}: {problem['msg']}. {AGAIN}.") from None
