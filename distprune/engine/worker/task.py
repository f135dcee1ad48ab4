"""What a worker does with one layer: an object that names its input, and does it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from distprune.engine.worker.layer_worker import LayerWorker


class Task:
    """A pure function of checkpoint, configuration and its own fields; subclasses are frozen dataclasses.

    Because it is pure, any worker may run it, twice or again after a crash, and gives the same bytes.

    On its way to a worker a field may be a reference to a value that the pool was given, or a :class:`Later`, instead
    of the value itself; tensors travel as host tensors.
    """

    #: How many values it gives.
    results: ClassVar[int] = 1

    def run(self, worker: LayerWorker) -> Any:
        """Do it. Tasks with several results return a tuple of them."""
        raise NotImplementedError

    @classmethod
    def kind(cls) -> str:
        """What tasks of this class are called where people read it."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    @property
    def layer(self) -> int | None:
        """The layer that it is about, if it is about one."""
        return getattr(self, "index", None)

    @property
    def values(self) -> list[Any]:
        """Its fields, each :class:`Later` made."""
        given = (getattr(self, field.name) for field in fields(self))
        return [value.make() if isinstance(value, Later) else value for value in given]

    def __str__(self) -> str:
        return f"'{self.kind()}'" + ("" if self.layer is None else f" of layer {self.layer}")


@dataclass(frozen=True)
class Later:
    """A field that is made when its task starts, and again if it must start again; nothing is held until then."""

    make: Callable[[], Any]
