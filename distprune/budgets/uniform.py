"""The same widths in every layer, up to one alignment step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import ceil

from distprune.budgets.accounting import decoder_parameters, layer_parameters
from distprune.budgets.target import Target
from distprune.errors import InputError
from distprune.modeling import LayerShape


def aligned(width: float, align: int, most: int) -> int:
    """``width`` rounded to the nearest multiple of ``align``, at least one multiple and at most ``most``."""
    return min(most, max(align, round(width / align) * align))


def fill_with_ffn(
    target: Target, shapes: Sequence[LayerShape], align: int, wanted: Sequence[float] | None = None
) -> list[LayerShape]:
    """Give every layer the FFN width at which the whole decoder meets the target, all else in ``shapes`` standing.

    The sum of the widths is the one nearest to the target, and no FFN becomes wider than the dense one, even where
    the rest of ``shapes`` has lost more than the target asks for. Where the target is a stock layout, all FFNs are
    equally wide, and the whole is within half a step of ``align`` in every layer.

    Args:
        target: how many parameters may remain.
        shapes: the layers; their FFN widths are not looked at.
        align: widths are multiples of this.
        wanted: how wide each layer wants to be, in proportion; by default all the same, and widths then differ by at
            most one step of ``align``. A stock layout has no use for it.

    Raises:
        InputError: what ``shapes`` hold besides FFN neurons already exceeds the target.
    """
    config, layers = target.config, len(shapes)
    narrow = [replace(shape, ffn_width=align) for shape in shapes]
    step = layer_parameters(config, 0, replace(narrow[0], ffn_width=2 * align)) - layer_parameters(config, 0, narrow[0])
    more = (target.remaining - decoder_parameters(config, narrow)) / step
    steps = layers * (1 + round(more / layers)) if target.stock else layers + round(more)
    if steps < layers:
        raise InputError(
            f"sparsity {target.sparsity:g} can't be reached: it leaves no FFN neurons. Ask for a lower --sparsity."
        )
    full = config.intermediate_size
    even = target.stock or wanted is None
    widths = share_out(steps, [1.0] * layers if even else wanted, most=ceil(full / align))
    return [replace(shape, ffn_width=min(align * width, full)) for shape, width in zip(shapes, widths, strict=True)]


def share_out(total: int, wanted: Sequence[float], most: int) -> list[int]:
    """Whole numbers in proportion to ``wanted`` that sum to ``total``, none below 1 and none above ``most``.

    Where ``most`` stands in the way of the total, every share is ``most``.
    """
    low, high = 0.0, total / min(wanted)
    for _ in range(100):  # the scale at which the capped shares sum to the total
        scale = (low + high) / 2
        reached = sum(min(most, max(1.0, scale * share)) for share in wanted) >= total
        low, high = (low, scale) if reached else (scale, high)
    ends = [0, *(round(end) for end in accumulate(min(most, max(1.0, high * share)) for share in wanted))]
    return [end - start for start, end in pairwise(ends)]
