"""What a pruning method is: statistics in, a plan of shapes, and a pruned layer of the planned shape out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from distprune.budgets import Menu, Target, are_alike, fill_with_ffn
from distprune.errors import InputError
from distprune.layers.parts import DecoderLayer, Experts
from distprune.layers.shapes import LayerShape
from distprune.methods.even_layers import ProfileRead, UnknownProfile, with_fewer_groups
from distprune.methods.networks import moments_of_each
from distprune.statistics import LayerStatistics, Moment

#: What the dense pass, or the gradient pass, leaves of one layer for planning and pruning: named tensors, which wait on
#: disk. A plan sees those of all layers, so of large ones it should read none.
Profile = Mapping[str, Tensor]

#: Runs a variation of the layer that is being pruned on the same hidden states, and collects moments inside it.
Observe = Callable[[DecoderLayer, Sequence[Moment]], LayerStatistics]

#: What to remember of some of a mixture's experts, given these, their numbers in the layer and what was seen of them.
#: The first dimension of every tensor is the experts'.
ProfileExperts = Callable[[Experts, range, LayerStatistics], Profile]

#: What some of a mixture's experts become, given the same.
ChangeExperts = Callable[[Experts, range, LayerStatistics], Experts]


class Plan(list[LayerShape]):
    """The shape of every layer, in their order; of a method that predicts it, what the loss will rise by.

    Args:
        shapes: of all layers.
        predicted_loss: the increase of the loss, in nats a token; None where the method does not say.
        gap: at most so much of it, as a fraction, is more than the least that any plan on offer costs.
        by_layer: what each layer adds to it; None where the method does not say.
    """

    def __init__(
        self,
        shapes: Iterable[LayerShape],
        predicted_loss: float | None = None,
        gap: float | None = None,
        by_layer: Sequence[float] | None = None,
    ):
        super().__init__(shapes)
        self.predicted_loss, self.gap, self.by_layer = predicted_loss, gap, by_layer


@dataclass(frozen=True)
class CostCurve:
    """What it is predicted to cost to narrow one thing of a layer, while all else of the model stays.

    Attributes:
        kept: how much of it stays, ascending, in the units of the shape's field that says it.
        costs: the increase of the loss then, in nats a token.
    """

    kept: list[int]
    costs: list[float]


@dataclass(frozen=True)
class Paper:
    """Where a method was published: title, authors and venue, and its number on arXiv."""

    title: str
    arxiv: str | None = None


@dataclass(frozen=True)
class LayerToPrune:
    """A layer, what it is to become, and what is known of it.

    Attributes:
        index: its place among the layers.
        layer: as the checkpoint has it, on the worker's device.
        planned: the shape that it is to have.
        statistics: the moments that :meth:`Method.pruning_moments` named.
        profile: what :meth:`Method.profile` said of the dense layer.
        observe: runs a variation of the layer on what reaches it, and collects moments inside it.
        sparsity: what the run asks for; of use where weights are zeroed, since the planned shape then says nothing.
        sees_errors: whether moments of ATTENTION_ERROR and FFN_ERROR are among those that it can collect, see
            :meth:`Method.aims_at_dense`.
    """

    index: int
    layer: DecoderLayer
    planned: LayerShape
    statistics: LayerStatistics
    profile: Profile
    observe: Observe
    sparsity: float
    sees_errors: bool = field(default=False, kw_only=True)

    def change_experts(
        self, variation: DecoderLayer, moments: Sequence[Moment] | None, change: ChangeExperts
    ) -> tuple[DecoderLayer, LayerStatistics]:
        """Change every expert of a variation of the layer, whose attention and router are final.

        Where experts come a chunk at a time, this is the one way to their tensors, and no more than a chunk's moments
        are held at once.

        Args:
            variation: may have fewer experts than the layer.
            moments: to collect: of its experts, for ``change``, and of what every token passes through. None: those
                that :meth:`Method.pruning_moments` named; where experts come a chunk at a time, those of single experts
                are collected now, and not in ``statistics``.
            change: is given experts as they are. What it makes of them is one width for all.

        Returns:
            The variation with the changed experts, and what was seen of what every token passes through.
        """
        statistics = self.statistics if moments is None else self.observe(variation, moments)
        experts = variation.ffn
        assert isinstance(experts, Experts)
        return replace(variation, ffn=change(experts, range(experts.shape.count), statistics)), statistics


class Method(BaseModel):
    """A pruning method; its fields are its hyperparameters, under the names and with the defaults of its paper.

    A run calls, in this order and each as a pure function: on every layer of the dense model :meth:`profile`, with
    the moments that :meth:`dense_moments` and :meth:`gradient_moments` name; once :meth:`plan`, which sees all
    profiles; and on every layer :meth:`prune`, with the moments that :meth:`pruning_moments` names, collected on what
    reaches the layer through the pruned layers before it. Where there are none before it, these are the dense model's,
    and what :meth:`carried_moments` names is collected in the dense pass and kept for then.

    A layer may lack attention or feed-forward network: moments are asked for at the sites of the parts that its shape
    has, and what a layer lacks, or what may not go of it (:class:`~distprune.layers.shapes.Removable`), is left alone.

    A layer's tensors come as the checkpoint has them, on the worker's device, and what is computed with them is to be
    computed in float32, one projection at a time: a large layer doesn't fit in memory twice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    #: Where the method is described; None of those that no paper describes.
    paper: ClassVar[Paper | None] = None
    #: The resources that the method can plan for, and the layouts that its plans may be asked for in.
    targets: ClassVar[tuple[str, ...]] = ("parameters",)
    layouts: ClassVar[tuple[str, ...]] = ("free",)
    #: What it removes, by the names of :class:`Removable`'s fields.
    removes: ClassVar[tuple[str, ...]] = ("heads", "neurons")
    #: Whether it can do with some of a mixture's experts at a time: its ``profile`` says nothing of single experts,
    #: which :meth:`expert_profiler` does, and its ``prune`` gets at them by :meth:`LayerToPrune.change_experts`.
    takes_chunks: ClassVar[bool] = False
    #: Whether it plans by :meth:`menus` where layers may differ, so that a search can measure what is on them.
    has_menus: ClassVar[bool] = False

    @property
    def zeroes(self) -> bool:
        """Whether it sets weights to zero in matrices that keep their size, instead of removing parameters.

        Then plans leave every shape as it is, and the sparsity is the fraction of the weights of attention and
        feed-forward networks that become zero.
        """
        return False

    # ---------------------------------------------------------------- the dense pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        """Moments that the profile needs, collected in the dense pass."""
        return ()

    def gradient_moments(self, shape: LayerShape) -> Sequence[Moment]:
        """Moments that the profile needs of the loss's gradients, and of activations beside them.

        Their sites may be those of gradients. With none there is no gradient pass; with any, what :meth:`dense_moments`
        names is collected in it, not in the dense pass.
        """
        return ()

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """What to remember of a dense layer."""
        return {}

    def overview_moments(self, shape: LayerShape) -> Sequence[Moment]:
        """Small moments of all of a mixture's experts, which :meth:`expert_profiler` needs besides."""
        return ()

    def expert_profiler(self, layer: DecoderLayer, statistics: LayerStatistics) -> ProfileExperts | None:
        """What profiles some of a mixture's experts at a time; None where :meth:`profile` says all.

        It is called with the dense layer, whose experts' tensors may be elsewhere, and with what is seen before any
        moments of single experts: those of :meth:`overview_moments`, of the mixture's input and, in a gradient pass, of
        the gradient at its output. What is made of each chunk of experts is joined along the first dimension.
        """
        return None

    def whole_profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """What to remember of a dense layer whose experts are all here."""
        profile, profiler = self.profile(layer, statistics), self.expert_profiler(layer, statistics)
        if profiler is None:
            return profile
        assert isinstance(layer.ffn, Experts)
        return {**profile, **profiler(layer.ffn, range(layer.ffn.shape.count), statistics)}

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        """See, before any weight is read, that the target can be reached. Methods that override it call this too.

        Raises:
            InputError: it can't.
        """
        self.check_resource(target)
        can_go = what_can_go(target)
        self._check_offered("--layout", target.layout, "layouts", can_go)
        if target.sparsity and not can_go.intersection(self.removes):
            others = self._others(lambda method: can_go.intersection(method.removes))
            raise InputError(
                f"method {self.name} removes {', '.join(self.removes)}, and none of these can go from a "
                f"{family(target)} model in the layout {target.layout}. {others}"
            )
        if target.layout == "stock" and not are_alike(target.dense_shapes):
            raise InputError(
                f"--layout stock: the layers of this {family(target)} model differ, and pruning leaves them so. Give "
                "--layout heterogeneous or free."
            )

    def check_resource(self, target: Target) -> None:
        """See that the method can plan for what the target is of.

        Raises:
            InputError: it can't.
        """
        self._check_offered("--target", target.resource, "targets", what_can_go(target))

    def _check_offered(self, option: str, value: str, offers: str, can_go: set[str]) -> None:
        if value not in getattr(self, offers):
            others = self._others(lambda method: value in getattr(method, offers) and can_go & {*method.removes})
            raise InputError(
                f"{option} {value}: method {self.name} can't plan for it. {others} Or give {option} "
                f"{' or '.join(getattr(self, offers))}."
            )

    def _others(self, serves: Callable[[type[Method]], object]) -> str:
        """The advice to choose another method, of those that serve."""
        from distprune.methods.registry import METHODS  # which imports this module

        able = sorted(name for name, method in METHODS.items() if serves(method))
        return f"Choose one of the methods {', '.join(able)}." if able else "No other method does."

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        """The shape each layer is to have, the whole meeting ``target`` within one step of ``align``."""
        raise NotImplementedError

    def menus(self, target: Target, profiles: Sequence[Profile], align: int) -> Sequence[Menu]:
        """What every part of every layer may become, and what that is predicted to cost; of methods that plan so.

        A part that can't change has no menu.
        """
        return ()

    def cost_curves(self, shape: LayerShape, profile: Profile) -> Mapping[str, CostCurve]:
        """What the plan was made from, for people to see where it cut; nothing where the method does not say.

        By the field of the shape that is narrowed, such as "attention.query_rank" or "ffn.width".
        """
        return {}

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        """Moments to collect for pruning a layer of shape ``dense`` to ``planned``."""
        raise NotImplementedError

    def carried_moments(self, shape: LayerShape) -> Sequence[Moment]:
        """Moments for pruning that are small enough to be kept from the dense pass on, for all layers at once.

        They are collected in the dense pass whether or not a gradient pass follows. If they are all that pruning asks
        for, it need not run the layer again.
        """
        return ()

    def aims_at_dense(self, shape: LayerShape) -> bool:
        """Whether pruning a layer of this dense shape asks for how far it is from the dense model's hidden states.

        These are kept until then. Experts that come a chunk at a time are pruned without them.
        """
        return False

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        """The layer in its planned shape, on its device: what is new in float32, what stays as it was."""
        raise NotImplementedError

    # ---------------------------------------------------------------- predictions, before a run

    def even_profile(self, shape: LayerShape) -> Profile:
        """The profile of a layer whose units are worth more or less evenly: what a plan reads of it.

        Where a method does not say, and its plan reads a profile, :meth:`even_shapes` falls back on equal layers.
        """
        return UnknownProfile()

    def even_shapes(self, target: Target, align: int) -> list[LayerShape]:
        """The method's own plan for a model all of whose layers look alike.

        A method whose plan reads a profile that :meth:`even_profile` does not know is taken to narrow every layer by
        as much, of its parameters.

        Raises:
            InputError: the target can't be reached.
        """
        self.check_target(target, align)
        dense = target.dense_shapes
        if target.sparsity == 0:
            return dense
        profiles = {shape: self.even_profile(shape) for shape in dense}
        try:
            return self.plan(target, [profiles[shape] for shape in dense], align)
        except ProfileRead:
            target = replace(target, resource="parameters")
            if "heads" in self.removes:
                dense = [with_fewer_groups(target, index, target.decoder_sparsity) for index in range(len(dense))]
            return fill_with_ffn(target, dense, align)

    def profile_bytes(self, hidden_size: int, shape: LayerShape) -> int:
        """What a layer's profile takes, where that is not little against the layer itself."""
        return 0


def what_can_go(target: Target) -> set[str]:
    """What may go from one layer at least, by the names of :class:`Removable`'s fields."""
    removables = [asdict(target.removable(index)) for index in range(target.model.num_layers)]
    return {name for removable in removables for name, may_go in removable.items() if may_go}


def family(target: Target) -> str:
    return target.model.config.model_type


def of_parts(shape: LayerShape, *, attention: Iterable[Moment] = (), ffn: Iterable[Moment] = ()) -> list[Moment]:
    """The moments of those parts that a layer of the shape has: of the networks of a mixture, each one's own."""
    return [*(attention if shape.attention else ()), *moments_of_each(shape.ffn, ffn)]
