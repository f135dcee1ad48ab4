"""What a task does, counted: operations by kind, and bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from distprune.decoder_layer import LayerShape
from distprune.planning.rates import Rates
from distprune.statistics import Cross, Gram, HeadGram, Moment, ScalingPower
from distprune.statistics.products import tile_on

FLOAT32 = 4


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes where it says so."""

    forward: float = 0.0
    statistics: float = 0.0  # products, summed in float32
    solve_float32: float = 0.0
    solve_float64: float = 0.0
    eigen: float = 0.0
    passed: float = 0.0  # bytes of arrays gone over
    passed_in_solves: float = 0.0  # the same in solves, and of totals where these are
    moved: float = 0.0  # bytes between a GPU and its host
    stored: float = 0.0  # bytes through the object store
    read: float = 0.0  # bytes from the checkpoint
    written: float = 0.0  # bytes to disk

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * mine for mine in astuple(self)))

    @property
    def solves(self) -> float:
        return self.solve_float32 + self.solve_float64 + self.eigen

    def seconds(self, rates: Rates, solving: Rates | None = None, *, float32: bool = False) -> float:
        """One worker's time, one thing after the other; ``float32`` says that forward passes are in it.

        ``solving`` are the rates where layers are solved, if that is elsewhere.
        """
        solving = solving or rates
        return (
            self.forward / (rates.forward_float32 if float32 else rates.forward)
            + self.statistics / rates.products
            + self.solve_float32 / solving.float32
            + self.solve_float64 / solving.float64
            + self.eigen / solving.eigen
            + self.passed / rates.memory
            + self.passed_in_solves / solving.memory
            + self.moved / rates.link
            + self.stored / rates.store
            + self.read / rates.read
            + self.written / rates.write
        )


def total(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def forward_flops(shape: LayerShape, hidden: int, samples: int, length: int) -> float:
    """Of one forward pass of a layer over (samples, length, hidden); attention over all pairs, as a mask leaves it."""
    attention = 2 * length * shape.query_heads * (shape.query_key_dim + shape.value_dim)
    return float(samples * length) * (2 * matrix_parameters(shape, hidden) + attention)


def backward_flops(shape: LayerShape, hidden: int, samples: int, length: int) -> float:
    """Of the backward pass that follows, for the gradients of activations alone: weights get none.

    Every product with a weight has one that goes back, and attention's two have four.
    """
    attention = 4 * length * shape.query_heads * (shape.query_key_dim + shape.value_dim)
    return float(samples * length) * (2 * matrix_parameters(shape, hidden) + attention)


def matrix_parameters(shape: LayerShape, hidden: int) -> int:
    """Weights that every token is multiplied with."""

    def projection(width: int, rank: int | None) -> int:
        return width * hidden if rank is None else rank * (width + hidden)

    heads, groups = shape.query_heads, shape.kv_heads
    return (
        projection(heads * shape.query_key_dim, shape.query_rank)
        + projection(groups * shape.query_key_dim, shape.key_rank)
        + groups * shape.value_dim * hidden
        + projection(heads * shape.value_dim, shape.output_rank)
        + 3 * shape.ffn_width * hidden
        + 2 * hidden * (shape.calibration_rank or 0)
    )


def update_parameters(shape: LayerShape, hidden: int, rank: int) -> int:
    """Of low-rank updates to all projections, those of factored ones included."""

    def update(out: int, inputs: int) -> int:
        return min(rank, out, inputs) * (out + inputs)

    def projection(out: int, inputs: int, factors: int | None) -> int:
        return update(out, inputs) if factors is None else update(out, factors) + update(factors, inputs)

    queries, keys = shape.query_heads * shape.query_key_dim, shape.kv_heads * shape.query_key_dim
    values, groups_values = shape.query_heads * shape.value_dim, shape.kv_heads * shape.value_dim
    branch = projection(hidden, hidden, shape.calibration_rank) if shape.calibration_rank else 0
    return (
        projection(queries, hidden, shape.query_rank)
        + projection(keys, hidden, shape.key_rank)
        + update(groups_values, hidden)
        + projection(hidden, values, shape.output_rank)
        + 3 * update(shape.ffn_width, hidden)
        + branch
    )


def tap_widths(shape: LayerShape, hidden: int) -> dict[str, int]:
    """The width of every activation that can be observed, and of every gradient."""
    narrow = ("attention_input", "attention_output", "ffn_input", "ffn_output")
    queries, keys = shape.query_heads * shape.query_key_dim, shape.kv_heads * shape.query_key_dim
    return {
        **dict.fromkeys(narrow, hidden),
        **dict.fromkeys(("attention_output_gradient", "ffn_output_gradient"), hidden),
        **dict.fromkeys(("queries", "query_gradient"), queries),
        **dict.fromkeys(("keys", "key_gradient"), keys),
        "attention_values": shape.query_heads * shape.value_dim,
        "value_gradient": shape.kv_heads * shape.value_dim,
        **dict.fromkeys(("ffn_neurons", "gate_gradient", "up_gradient"), shape.ffn_width),
    }


def moment_size(moment: Moment, widths: dict[str, int]) -> int:
    """Numbers that a moment holds."""
    width = widths[moment.tap]
    match moment:
        case Gram():
            return width * width
        case Cross(other=other):
            return width * widths[other]
        case HeadGram(heads=heads):
            return width * width // heads
        case ScalingPower(groups=groups, pairs=pairs):
            return groups * pairs
    return width


def moment_work(
    moment: Moment, widths: dict[str, int], tokens: int, batches: int, itemsize: int, device: str = "cpu"
) -> Work:
    """Of measuring it over all tokens: products where it is one, and passes over activations and totals."""
    size, width, tile = moment_size(moment, widths), widths[moment.tap], tile_on(device)
    match moment:
        case Gram():
            computed = sum(min(tile, width - start) * (width - start) for start in range(0, width, tile))
        case Cross() | HeadGram():
            computed = size
        case _:
            computed = 0
    # Read, cast to float32 and gone over once more; a total is read and written with every micro-batch.
    passed, grown = tokens * width * (itemsize + 2.0 * FLOAT32), 2.0 * FLOAT32 * max(computed, width) * batches
    return Work(statistics=2.0 * tokens * computed, passed=passed, passed_in_solves=grown)
