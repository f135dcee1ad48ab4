"""The same widths in every layer, up to one alignment step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil

from distprune.budgets.target import Target
from distprune.errors import InputError
from distprune.layers.shapes import ExpertsShape, LayerShape


def aligned(width: float, align: int, most: int) -> int:
    """``width`` rounded to the nearest multiple of ``align``, at least one multiple and at most ``most``."""
    return min(most, max(align, round(width / align) * align))


def fill_with_ffn(
    target: Target, shapes: Sequence[LayerShape], align: int, wanted: Sequence[float] | None = None
) -> list[LayerShape]:
    """Give every layer the FFN width at which the whole decoder meets the target, all else in ``shapes`` standing.

    What the widths take is within half a step of ``align`` of the target, in the layer where a step takes most, and no
    FFN becomes wider than the dense one, even where the rest of ``shapes`` has lost more than the target asks for. A
    mixture's width is that of each of its experts. In a stock layout all mixtures are equally wide, all other FFNs too,
    and the whole is within half a step of ``align`` in every layer. Layers without an FFN that may lose neurons stay as
    they are.

    Args:
        target: how much may remain.
        shapes: the layers; their FFN widths are not looked at where neurons may go.
        align: widths are multiples of this.
        wanted: how wide each layer wants to be, in proportion; by default as wide as the dense one, and layers that
            are alike then differ by at most one step of ``align``. A stock layout has no use for it.

    Raises:
        InputError: what ``shapes`` hold besides FFN neurons already exceeds the target.
    """
    dense, filled = target.dense_shapes, list(shapes)
    full = {
        index: shape.ffn.width for index, shape in enumerate(dense) if shape.ffn and target.removable(index).neurons
    }
    alike = target.layout == "stock"
    groups = of_one_width(dense, full) if alike else [[index] for index in full]
    for index in full:
        filled[index] = filled[index].with_ffn(width=align)
    steps = [sum(neurons_amount(target, index, filled[index], align) for index in group) for group in groups]
    if not groups or not min(steps):  # neurons make no difference
        if target.amount(shapes) > target.remaining:
            raise unreachable(target, "what else goes is too little, and no FFN neurons can go")
        return list(shapes)
    # The dearest come last, so that what rounding leaves is not made up for by many neurons of cheap ones.
    order = sorted(range(len(groups)), key=lambda place: steps[place])
    steps, groups = [steps[place] for place in order], [groups[place] for place in order]
    more = (target.remaining - target.amount(filled)) / steps[0]
    if round(more) < 0:
        raise unreachable(target, "it leaves no FFN neurons")
    even = [full[first] / max(full.values()) for first, *_ in groups]
    shares = [wanted[index] for (index,) in groups] if wanted and not alike else even
    most = [ceil(full[first] / align) for first, *_ in groups]
    prices = [step / steps[0] for step in steps]
    for group, width in zip(groups, share_out(sum(prices) + more, shares, most, prices), strict=True):
        for index in group:
            filled[index] = filled[index].with_ffn(width=min(align * width, full[index]))
    return filled


def of_one_width(shapes: Sequence[LayerShape], layers: Iterable[int]) -> list[list[int]]:
    """The layers that a plain configuration has one width for: those with mixtures, and those without."""
    groups: dict[bool, list[int]] = {}
    for index in layers:
        groups.setdefault(isinstance(shapes[index].ffn, ExpertsShape), []).append(index)
    return [*groups.values()]


def neurons_amount(target: Target, index: int, shape: LayerShape, neurons: int) -> int:
    """What so many more neurons take of the budget in layer ``index`` of ``shape``; nothing without an FFN."""
    if shape.ffn is None:
        return 0
    wider = shape.with_ffn(width=shape.ffn.width + neurons)
    return target.ffn_amount(index, wider.ffn) - target.ffn_amount(index, shape.ffn)


def affordable_neurons(target: Target, index: int, shape: LayerShape, budget: float) -> float:
    """How wide layer ``index`` of ``shape`` may make its FFN if it may take ``budget``."""
    narrow = shape.with_ffn(width=1)
    return 1 + (budget - target.layer_amount(index, narrow)) / neurons_amount(target, index, narrow, 1)


def unreachable(target: Target, why: str) -> InputError:
    return InputError(f"sparsity {target.sparsity:g} can't be reached: {why}. Ask for a lower --sparsity.")


def share_out(total: float, wanted: Sequence[float], most: Sequence[int], prices: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to ``wanted`` that cost ``total``, none below 1 and none above its ``most``.

    Where ``most`` stands in the way of the total, every share is its ``most``. ``prices`` are what one costs of each,
    the least being 1.
    """
    low, high = 0.0, total / min(wanted)

    def costs(scale: float) -> list[float]:
        return [
            price * min(cap, max(1.0, scale * share)) for share, cap, price in zip(wanted, most, prices, strict=True)
        ]

    for _ in range(100):  # the scale at which the capped shares cost the total
        scale = (low + high) / 2
        low, high = (low, scale) if sum(costs(scale)) >= total else (scale, high)
    shares, end, spent = [], 0.0, 0.0
    for cost, cap, price in zip(costs(high), most, prices, strict=True):
        end += cost
        shares.append(min(cap, max(1, round((end - spent) / price))))
        spent += price * shares[-1]
    return shares
