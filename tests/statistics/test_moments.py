"""Moments over uneven micro-batches, against numpy in float64 on all activations at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape
from distprune.layers.sites import ATTENDED, FFN_OUTPUT, GATE, NEURONS, QUERIES, SITES, Site
from distprune.statistics import (
    Cross,
    Gram,
    HeadGram,
    LayerStatistics,
    Mean,
    Peak,
    Power,
    ScalingPower,
    moment_size,
    site_widths,
    sites_of,
)
from distprune.statistics.products import TILE, as_exact_as_its

MICRO_BATCHES = [7, 1, 30, 12]
WIDTHS = {QUERIES: 12, FFN_OUTPUT: 8, QUERIES.gradient: 12}
X, Y, G = WIDTHS
EVERYTHING = [Mean(X), Power(X), Peak(X), Gram(X), Cross(X, Y), HeadGram(X, 3), ScalingPower(X, G, 3, 2)]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def activations(request) -> dict[Site, torch.Tensor]:
    """(50, width) at some sites, not centred, and no two channels of one size."""
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> torch.Tensor:
        return (torch.randn(50, width, generator=generator) + 0.5) * torch.arange(1, width + 1)

    return {site: draw(width).to(request.param) for site, width in WIDTHS.items()}


@pytest.fixture
def samples(activations) -> dict[Site, np.ndarray]:
    return {site: values.double().numpy() for site, values in activations.items()}


def collect(moments, activations: dict[Site, torch.Tensor]) -> LayerStatistics:
    statistics = LayerStatistics(moments)
    batches = {site: values.split(MICRO_BATCHES) for site, values in activations.items()}
    for number in range(len(MICRO_BATCHES)):
        statistics.update({site: batch[number] for site, batch in batches.items()})
    return statistics


def assert_equal(actual: torch.Tensor, expected: np.ndarray) -> None:
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_every_site_counts_its_own_tokens(activations, samples):
    """An expert sees the tokens that are routed to it: of each micro-batch another number, or none at all."""
    expert = Site("ffn", "neurons of an expert")
    routed = [5, 0, 11, 1]
    x = activations[X][: sum(routed)]
    statistics = LayerStatistics([Mean(expert), Peak(expert), Gram(expert), Cross(expert, expert), Mean(X)])
    for own, others in zip(x.split(routed), activations[X].split(MICRO_BATCHES), strict=True):
        statistics.update({expert: own, X: others})
    assert (statistics.tokens(expert), statistics.tokens(X)) == (17, 50)
    seen = samples[X][:17]
    assert_equal(statistics.mean(expert), seen.mean(axis=0))
    assert_equal(statistics.peak(expert), np.abs(seen).max(axis=0))
    assert_equal(statistics.gram(expert), seen.T @ seen / 17)
    assert_equal(statistics.cross(expert, expert), seen.T @ seen / 17)
    assert_equal(statistics.mean(X), samples[X].mean(axis=0))
    tensors = statistics.to_tensors([Gram(expert), Mean(X)])
    back = LayerStatistics.from_tensors(tensors, [Gram(expert), Mean(X)])
    assert (back.tokens(expert), back.tokens(X)) == (17, 50)


def test_a_site_that_no_token_reaches_has_moments_of_nothing():
    nothing = torch.empty(0, 6)
    statistics = LayerStatistics([Mean(X), Power(X), Peak(X), Gram(X), HeadGram(X, 2)])
    statistics.update({X: nothing})
    assert statistics.tokens(X) == 0
    for moment in (statistics.mean(X), statistics.power(X), statistics.peak(X)):
        assert torch.equal(moment, torch.zeros(6))
    assert torch.equal(statistics.gram(X), torch.zeros(6, 6))


def test_a_site_that_the_layer_does_not_have_is_an_error_of_the_method(activations):
    with pytest.raises(KeyError, match="ffn"):
        collect([Power(NEURONS)], activations)
    with pytest.raises(KeyError):
        collect([], activations).tokens(X)


def test_averages_come_back_from_named_tensors(activations, tmp_path):
    kept, left = [Mean(X), HeadGram(Y, 2)], Power(X)
    statistics = collect([*kept, left], activations)
    save_file(statistics.to_tensors(kept), tmp_path / "averages")
    tensors = load_file(tmp_path / "averages")
    assert sorted(tensors) == [
        "HeadGram(ffn.output, 2)", "Mean(attention.queries)", "tokens(attention.queries)", "tokens(ffn.output)",
    ]  # fmt: skip
    back = LayerStatistics.from_tensors(tensors, kept)
    assert back.tokens(X) == back.tokens(Y) == 50
    assert torch.equal(back.mean(X), statistics.mean(X))
    assert torch.equal(back.head_gram(Y, 2), statistics.head_gram(Y, 2))
    assert LayerStatistics.from_tensors(tensors, [*kept, left]) is None
    assert LayerStatistics.from_tensors(statistics.to_tensors([]), []) is None


def test_peak(activations, samples):
    assert_equal(collect([Peak(X)], activations).peak(X), np.abs(samples[X]).max(axis=0))


def test_mean(activations, samples):
    assert_equal(collect([Mean(X)], activations).mean(X), samples[X].mean(axis=0))


def test_power_and_rms(activations, samples):
    statistics = collect([Power(X)], activations)
    assert_equal(statistics.power(X), (samples[X] ** 2).mean(axis=0))
    assert_equal(statistics.rms(X), np.sqrt((samples[X] ** 2).mean(axis=0)))


def test_gram(activations, samples):
    assert_equal(collect([Gram(X)], activations).gram(X), samples[X].T @ samples[X] / 50)


def test_cross(activations, samples):
    assert_equal(collect([Cross(X, Y)], activations).cross(X, Y), samples[X].T @ samples[Y] / 50)


def test_head_gram_holds_the_gram_matrix_of_every_heads_own_slice(activations, samples):
    heads = np.split(samples[X], 3, axis=1)
    expected = np.stack([head.T @ head / 50 for head in heads])
    assert_equal(collect([HeadGram(X, 3)], activations).head_gram(X, 3), expected)


@pytest.mark.parametrize(("groups", "heads", "pairs"), [(3, 1, 2), (1, 3, 2), (2, 1, 3), (1, 2, 3), (1, 1, 6)])
def test_scaling_power_is_of_a_pairs_part_of_the_inner_product_in_all_heads_of_its_group(
    activations, samples, groups, heads, pairs
):
    expected = np.zeros((groups, pairs))
    for group in range(groups):
        for pair in range(pairs):
            for x, gradient in zip(samples[X], samples[G], strict=True):
                change = 0.0
                for head in range(group * heads, (group + 1) * heads):
                    first = head * 2 * pairs + pair
                    change += x[first] * gradient[first] + x[first + pairs] * gradient[first + pairs]
                expected[group, pair] += change**2 / 50
    moment = ScalingPower(X, G, groups, pairs)
    assert_equal(collect([moment], activations).scaling_power(X, G, groups, pairs), expected)


def test_moments_collected_together_are_those_collected_alone(activations):
    together = collect(EVERYTHING, activations)
    assert torch.equal(together.mean(X), collect([Mean(X)], activations).mean(X))
    assert torch.equal(together.gram(X), collect([Gram(X)], activations).gram(X))
    assert torch.equal(together.head_gram(X, 3), collect([HeadGram(X, 3)], activations).head_gram(X, 3))
    scaled = collect([ScalingPower(X, G, 3, 2)], activations).scaling_power(X, G, 3, 2)
    assert torch.equal(together.scaling_power(X, G, 3, 2), scaled)


def test_a_gram_matrix_wider_than_its_tiles_is_whole_and_symmetric():
    x = torch.randn(50, 5 * TILE // 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    gram = collect([Gram(X)], {X: x}).gram(X)
    assert_equal(gram, x.double().numpy().T @ x.double().numpy() / 50)
    assert torch.equal(gram[TILE:, :TILE], gram[:TILE, TILE:].T)


def test_a_moment_is_held_once_and_reads_the_same_twice(activations):
    statistics = collect([Gram(X), Peak(X)], activations)
    total = statistics._totals[Gram(X)]
    before = statistics.gram(X).clone()
    assert statistics.gram(X) is statistics.gram(X)
    assert statistics.gram(X).data_ptr() == total.data_ptr()
    assert torch.equal(statistics.gram(X), before)


def test_nothing_can_be_added_once_a_moment_was_read(activations):
    statistics = collect([Mean(X), Power(X)], activations)
    statistics.mean(X)
    with pytest.raises(RuntimeError, match="have been read"):
        statistics.update(activations)


def test_what_is_collected_in_inference_mode_can_be_read_outside(activations, samples):
    with torch.inference_mode():
        statistics = collect([Gram(X)], activations)
    assert_equal(statistics.gram(X), samples[X].T @ samples[X] / 50)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "medium"), (torch.float16, "highest"), (torch.float32, "highest")],
    ids=str,
)
def test_products_are_rounded_only_where_that_loses_nothing(dtype, precision):
    """Medium is bfloat16."""
    with as_exact_as_its(torch.ones(1, dtype=dtype)):
        assert torch.get_float32_matmul_precision() == precision
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("moment", [Gram(X), Cross(X, Y), HeadGram(X, 4)], ids=str)
def test_products_of_many_tokens_are_as_exact_in_bfloat16_as_in_float64(moment):
    """Wide and long enough for the CPU's matrix units, where it has any."""
    generator = torch.Generator().manual_seed(0)
    activations = {site: (torch.randn(2048, 256, generator=generator) + 0.5).bfloat16() for site in (X, Y)}
    x, y = (activations[site].double().numpy() for site in (X, Y))
    product = x.T @ (x if moment.site == getattr(moment, "other", X) else y) / 2048
    if isinstance(moment, HeadGram):
        product = np.stack([product[start : start + 64, start : start + 64] for start in range(0, 256, 64)])
    actual = collect_whole(moment, activations)
    np.testing.assert_allclose(actual.double().numpy(), product, rtol=0, atol=2e-6 * np.abs(product).max())


def collect_whole(moment, activations: dict[Site, torch.Tensor]) -> torch.Tensor:
    statistics = LayerStatistics([moment])
    statistics.update(activations)
    return statistics._average(moment)


def test_the_sites_of_moments_are_those_they_are_of_each_once():
    assert sites_of([]) == set()
    assert sites_of([Mean(X), Cross(X, Y), Gram(Y)]) == {X, Y}
    assert sites_of([ScalingPower(X, G, 1, 6)]) == {X, G}


def test_moments_take_as_much_as_is_said_before_there_are_activations(activations):
    for moment in EVERYTHING:
        assert moment_size(moment, WIDTHS) == collect([moment], activations)._average(moment).numel()


def test_sites_are_those_of_the_parts_that_a_layer_has():
    attention, ffn = AttentionShape(4, 2, 6, 5), FeedForwardShape(40)
    widths = site_widths(24, LayerShape(attention, ffn))
    assert widths.keys() == {*SITES, *(site.gradient for site in SITES)}
    assert (widths[QUERIES], widths[ATTENDED], widths[NEURONS], widths[FFN_OUTPUT]) == (24, 20, 40, 24)
    assert {site.part for site in site_widths(24, LayerShape(None, ffn))} == {"ffn"}
    assert GATE not in site_widths(24, LayerShape(attention, FeedForwardShape(40, is_gated=False)))


@pytest.mark.parametrize(
    "ask",
    [
        lambda statistics: statistics.mean(Y),
        lambda statistics: statistics.power(Y),
        lambda statistics: statistics.rms(Y),
        lambda statistics: statistics.gram(Y),
        lambda statistics: statistics.cross(Y, X),
        lambda statistics: statistics.head_gram(X, 2),
        lambda statistics: statistics.scaling_power(X, G, 1, 2),
    ],
    ids=["mean", "power", "rms", "gram", "cross the other way round", "another number of heads", "of groups"],
)
def test_asking_for_a_moment_that_was_not_collected_raises(activations, ask):
    statistics = collect(EVERYTHING, activations)
    with pytest.raises(KeyError):
        ask(statistics)


@pytest.mark.parametrize("asked", EVERYTHING, ids=str)
def test_only_the_asked_for_moment_is_computed(activations, asked, monkeypatch):
    computed = []
    for kind in {type(moment) for moment in EVERYTHING}:

        def count(moment, total, batch, compute=kind.add):
            computed.append(moment)
            return compute(moment, total, batch)

        monkeypatch.setattr(kind, "add", count)
    collect([asked], activations)
    assert computed == [asked] * len(MICRO_BATCHES)
