"""Greedy elimination, against searches and ridge regressions in numpy float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from distprune.solvers import eliminate, elimination_path

OUT = 7


@dataclass(frozen=True)
class Problem:
    """A linear map of 24 correlated inputs of unlike scale."""

    weight: torch.Tensor
    gram: torch.Tensor
    damping: float

    def eliminate(self, keep: int, **options) -> tuple[list[int], np.ndarray]:
        kept, weight = eliminate(self.weight, self.gram, keep, self.damping, **options)
        return kept.tolist(), weight.numpy()

    def damped(self) -> np.ndarray:
        gram = self.gram.double().numpy()
        return gram + self.damping * np.diag(gram).mean() * np.eye(len(gram))

    def restricted(self, columns: list[int]) -> np.ndarray:
        """The weight on these columns alone that comes nearest to the whole, by the normal equations."""
        damped = self.damped()
        target = self.weight.double().numpy() @ damped[:, columns]
        return np.linalg.solve(damped[np.ix_(columns, columns)], target.T).T

    def error(self, columns: list[int], weight: np.ndarray, gram: np.ndarray) -> float:
        change = self.weight.double().numpy().copy()
        change[:, columns] -= weight
        return np.trace(change @ gram @ change.T)

    def least_error(self, columns: list[int]) -> float:
        return self.error(columns, self.restricted(columns), self.damped())


def problem(tokens: int = 200, damping: float = 0.01, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64) + 2 * torch.eye(24, dtype=torch.float64)
    x = torch.randn(tokens, 24, generator=generator, dtype=torch.float64) @ mixing
    x = x * torch.logspace(-1, 1, 24, dtype=torch.float64)[torch.randperm(24, generator=generator)]
    weight = torch.randn(OUT, 24, generator=generator, dtype=torch.float64)
    return Problem(weight.to(dtype), (x.T @ x / tokens).to(dtype), damping)


def columns_of(units: list[int], width: int) -> list[int]:
    return [unit * width + column for unit in units for column in range(width)]


TOKENS = pytest.mark.parametrize("tokens", [200, 10], ids=["full-rank Gram", "rank-deficient Gram"])
WIDTHS = pytest.mark.parametrize(("width", "keep"), [(1, 24), (1, 15), (1, 1), (3, 5), (8, 2), (24, 1)])


@TOKENS
@WIDTHS
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_what_is_left_is_the_ridge_regression_of_the_whole_output_on_the_kept_columns(tokens, width, keep, batch):
    this = problem(tokens)
    kept, weight = this.eliminate(keep, width=width, largest_batch=batch)
    assert len(kept) == keep and kept == sorted(set(kept))
    np.testing.assert_allclose(weight, this.restricted(columns_of(kept, width)), rtol=1e-8, atol=1e-8)


@TOKENS
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_at_a_time_it_finds_what_a_search_of_least_squares_errors_finds(tokens, width, seed):
    this = problem(tokens, seed=seed)
    units = list(range(24 // width))
    while len(units) > 3:
        errors = {unit: this.least_error(columns_of([u for u in units if u != unit], width)) for unit in units}
        units.remove(min(errors, key=errors.get))
        assert this.eliminate(len(units), width=width)[0] == units


def test_a_batch_is_of_those_that_cost_least_one_by_one():
    this, whole = problem(), list(range(24))
    errors = [this.least_error([unit for unit in whole if unit != gone]) for gone in whole]
    assert this.eliminate(18, largest_batch=6, smallest_batch=6)[0] == sorted(np.argsort(errors)[6:])


@pytest.mark.parametrize("seed", range(8))
def test_batches_halve_what_must_go_between_their_bounds(seed):
    """From 24 to 7: 17 must go; by halves at most 6 and at least 2, that is 6, 5, 3, 2 and the last."""
    this = problem(seed=seed)
    units = list(range(24))
    for batch in (6, 5, 3, 2, 1):
        errors = {unit: this.least_error([u for u in units if u != unit]) for unit in units}
        for unit in sorted(units, key=errors.get)[:batch]:
            units.remove(unit)
    assert this.eliminate(7, largest_batch=6, smallest_batch=2)[0] == units


@TOKENS
@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_it_is_never_worse_than_the_kept_columns_unchanged(tokens, damping):
    this = problem(tokens, damping)
    gram = this.gram.numpy()
    for keep in range(1, 24):
        kept, weight = this.eliminate(keep, largest_batch=3)
        unchanged = this.weight.numpy()[:, kept]
        assert this.error(kept, weight, gram) <= this.error(kept, unchanged, gram) * (1 + 1e-12)


def test_copies_of_an_input_stand_in_for_each_other():
    """Ten inputs and a copy of each: all ten copies can go at once, and the weights of both are added."""
    x = torch.randn(100, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(1, 2)
    weight = torch.randn(OUT, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept, merged = eliminate(weight, x.T @ x / 100, 10, damping=1e-9)
    assert sorted(unit % 10 for unit in kept.tolist()) == list(range(10))
    torch.testing.assert_close(merged, (weight[:, :10] + weight[:, 10:])[:, kept % 10], atol=1e-5, rtol=0)


def test_float32_moments_with_an_outlier_channel_lose_nothing():
    this = problem(dtype=torch.float32)
    scale = torch.ones(24)
    scale[5] = 1e3
    outlier = Problem(this.weight, this.gram * scale * scale[:, None], damping=1e-6)
    assert np.linalg.cond(outlier.damped()) > 1e5
    kept, weight = outlier.eliminate(9, largest_batch=4)
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight, outlier.restricted(kept), rtol=1e-5, atol=1e-6)


def test_inputs_that_are_always_zero_go_first_and_change_nothing():
    this = problem()
    silent = torch.tensor([1, 4, 20])
    gram = this.gram.index_fill(0, silent, 0).index_fill(1, silent, 0)
    kept, weight = eliminate(this.weight, gram, 21, damping=1e-8)
    assert kept.tolist() == sorted(set(range(24)) - {1, 4, 20})
    assert torch.equal(weight, this.weight[:, kept])


def test_where_no_input_is_ever_anything_but_zero_the_largest_weights_stay():
    this = problem()
    kept, weight = eliminate(this.weight, torch.zeros(24, 24), 10, 0.01, largest_batch=5)
    assert kept.tolist() == sorted(this.weight.square().sum(dim=0).argsort(descending=True)[:10].tolist())
    assert torch.equal(weight, this.weight[:, kept])


def test_its_operands_stay_as_they_were():
    this = problem()
    weight, gram = this.weight.clone(), this.gram.clone()
    this.eliminate(5, largest_batch=3)
    assert torch.equal(this.weight, weight) and torch.equal(this.gram, gram)


# ------------------------------------------------------------------ the whole path


@TOKENS
@pytest.mark.parametrize(("width", "batch"), [(1, 1), (1, 5), (1, 24), (1, 100), (3, 1), (4, 4), (24, 1)])
def test_the_path_says_what_the_best_fit_on_the_rest_costs_after_every_batch(tokens, width, batch):
    this, units = problem(tokens), 24 // width
    order, errors = elimination_path(this.weight, this.gram, this.damping, width=width, batch=batch)
    assert sorted(order.tolist()) == list(range(units))
    left = [order[gone:].tolist() for gone in range(0, units + batch, batch)]
    expected = [this.least_error(columns_of(kept, width)) for kept in left]
    assert errors.dtype == torch.float64 and errors[0] == 0
    np.testing.assert_allclose(errors, expected, rtol=1e-8, atol=1e-8 * expected[-1])
    assert (errors.diff() >= 0).all()


@TOKENS
@pytest.mark.parametrize(("width", "batch"), [(1, 1), (1, 7), (2, 5), (8, 1)])
def test_the_path_goes_where_elimination_in_such_batches_goes(tokens, width, batch):
    this, units = problem(tokens), 24 // width
    order, _ = elimination_path(this.weight, this.gram, this.damping, width=width, batch=batch)
    for gone in range(0, units, batch):
        kept, _ = this.eliminate(units - gone, width=width, largest_batch=batch, smallest_batch=batch)
        assert sorted(order[gone:].tolist()) == kept


def test_the_path_takes_a_batch_in_the_order_of_what_each_costs_alone():
    this, whole = problem(), list(range(24))
    errors = [this.least_error([unit for unit in whole if unit != gone]) for gone in whole]
    order, _ = elimination_path(this.weight, this.gram, this.damping, batch=24)
    assert order.tolist() == np.argsort(errors).tolist()


def test_the_path_begins_with_inputs_that_are_always_zero_and_they_cost_nothing():
    this, silent = problem(), torch.tensor([1, 4, 20])
    gram = this.gram.index_fill(0, silent, 0).index_fill(1, silent, 0)
    order, errors = elimination_path(this.weight, gram, damping=1e-12)
    assert sorted(order[:3].tolist()) == silent.tolist()
    assert errors[3] < 1e-9 * errors[-1]


def test_the_path_leaves_its_operands_as_they_were():
    this = problem()
    weight, gram = this.weight.clone(), this.gram.clone()
    elimination_path(this.weight, this.gram, this.damping, batch=3)
    assert torch.equal(this.weight, weight) and torch.equal(this.gram, gram)
