"""The same widths in every layer, up to one alignment step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from distprune.budgets.accounting import ParameterTarget, decoder_parameters, layer_parameters
from distprune.errors import InputError
from distprune.modeling import LayerShape


def aligned(width: float, align: int, most: int) -> int:
    """``width`` rounded to the nearest multiple of ``align``, at least one multiple and at most ``most``."""
    return min(most, max(align, round(width / align) * align))


def fill_with_ffn(target: ParameterTarget, shapes: Sequence[LayerShape], align: int) -> list[LayerShape]:
    """Give every layer the FFN width at which the whole decoder meets the target, all else in ``shapes`` standing.

    Widths differ by at most one step of ``align`` between layers, and the sum is the one nearest to the target. No FFN
    becomes wider than the dense one, even where the rest of ``shapes`` has lost more than the target asks for.

    Raises:
        InputError: what ``shapes`` hold besides FFN neurons already exceeds the target.
    """
    config, layers = target.config, len(shapes)
    narrow = [replace(shape, ffn_width=align) for shape in shapes]
    step = layer_parameters(config, 0, replace(narrow[0], ffn_width=2 * align)) - layer_parameters(config, 0, narrow[0])
    steps = layers + round((target.remaining - decoder_parameters(config, narrow)) / step)
    if steps < layers:
        raise InputError(
            f"sparsity {target.sparsity:g} can't be reached: it leaves no FFN neurons. Ask for a lower --sparsity."
        )
    widths = [align * ((index + 1) * steps // layers - index * steps // layers) for index in range(layers)]
    full = config.intermediate_size
    return [replace(shape, ffn_width=min(width, full)) for shape, width in zip(shapes, widths, strict=True)]
