"""What a pruning method is: statistics in, a plan of shapes, and a pruned layer of the planned shape out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from distprune.budgets import Target
from distprune.decoder_layer import DecoderLayer, LayerShape
from distprune.errors import InputError
from distprune.statistics import LayerStatistics, Moment

#: What the dense pass, or the gradient pass, leaves of one layer for planning and pruning: named tensors, which wait on
#: disk. A plan sees those of all layers, so of large ones it should read none.
Profile = Mapping[str, Tensor]

#: Runs a variation of the layer that is being pruned on the same hidden states, and collects moments inside it.
Observe = Callable[[DecoderLayer, Sequence[Moment]], LayerStatistics]


class Plan(list[LayerShape]):
    """The shape of every layer, in their order; of a method that predicts it, what the loss will rise by.

    Args:
        shapes: of all layers.
        predicted_loss: the increase of the loss, in nats a token; None where the method does not say.
        gap: at most so much of it, as a fraction, is more than the least that any plan on offer costs.
    """

    def __init__(self, shapes: Iterable[LayerShape], predicted_loss: float | None = None, gap: float | None = None):
        super().__init__(shapes)
        self.predicted_loss, self.gap = predicted_loss, gap


class Method(BaseModel):
    """A pruning method; its fields are its hyperparameters, under the names and with the defaults of its paper.

    A run calls, in this order and each as a pure function: on every layer of the dense model :meth:`profile`, with
    the moments that :meth:`dense_moments` and :meth:`gradient_moments` name; once :meth:`plan`, which sees all
    profiles; and on every layer :meth:`prune`, with the moments that :meth:`pruning_moments` names, collected on what
    reaches the layer through the pruned layers before it. Where there are none before it, these are the dense model's,
    and what :meth:`carried_moments` names is collected in the dense pass and kept for then.

    A layer's tensors come as the checkpoint has them, on the worker's device, and what is computed with them is to be
    computed in float32, one projection at a time: a large layer doesn't fit in memory twice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    #: The resources that the method can plan for, and the layouts that its plans may be asked for in.
    targets: ClassVar[tuple[str, ...]] = ("parameters",)
    layouts: ClassVar[tuple[str, ...]] = ("per-layer",)

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        """Moments that the profile needs, collected in the dense pass."""
        return ()

    def gradient_moments(self, shape: LayerShape) -> Sequence[Moment]:
        """Moments that the profile needs of the loss's gradients, and of activations beside them.

        Their taps are those of :mod:`distprune.backward` too. With none there is no gradient pass; with any, what
        :meth:`dense_moments` names is collected in it, not in the dense pass.
        """
        return ()

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """What to remember of a dense layer."""
        return {}

    def profile_bytes(self, hidden_size: int, shape: LayerShape) -> int:
        """What a layer's profile takes, where that is not little against the layer itself."""
        return 0

    def check_target(self, target: Target, align: int) -> None:
        """See, before any weight is read, that the target can be reached. Methods that override it call this too.

        Raises:
            InputError: it can't.
        """
        self._check_offered("--target", target.resource, "targets")
        self._check_offered("--layout", "stock" if target.stock else "per-layer", "layouts")

    def _check_offered(self, option: str, value: str, offers: str) -> None:
        if value in getattr(self, offers):
            return
        able = sorted(method.name for method in named_methods(Method) if value in getattr(method, offers))
        mend = f"Choose one of the methods {', '.join(able)}, or" if able else "No method offers it:"
        raise InputError(
            f"{option} {value}: method {self.name} can't plan for it. {mend} give {option} "
            f"{' or '.join(getattr(self, offers))}."
        )

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        """The shape each layer is to have, the whole meeting ``target`` within one step of ``align``."""
        raise NotImplementedError

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        """Moments to collect for pruning a layer of shape ``dense`` to ``planned``."""
        raise NotImplementedError

    def carried_moments(self, shape: LayerShape) -> Sequence[Moment]:
        """Moments for pruning that are small enough to be kept from the dense pass on, for all layers at once.

        They are collected in the dense pass whether or not a gradient pass follows. If they are all that pruning asks
        for, it need not run the layer again.
        """
        return ()

    def prune(
        self,
        layer: DecoderLayer,
        planned: LayerShape,
        statistics: LayerStatistics,
        profile: Profile,
        observe: Observe,
    ) -> DecoderLayer:
        """The layer pruned to the ``planned`` shape, on its device: what is new in float32, what stays as it was."""
        raise NotImplementedError


def named_methods(base: type[Method]) -> Iterator[type[Method]]:
    """The subclasses that are whole methods."""
    for method in base.__subclasses__():
        if "name" in vars(method):
            yield method
        yield from named_methods(method)
