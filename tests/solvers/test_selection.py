"""Choosing units, against Python's sort."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from distprune.solvers import most_and_least_important, most_important

# Few values, so that ties are common.
importances = st.lists(st.integers(-3, 3), min_size=1, max_size=20)


def ranked(importance: list[int]) -> list[int]:
    """Indices by falling importance, ties by rising index."""
    return sorted(range(len(importance)), key=lambda index: (-importance[index], index))


@given(importances, st.data())
def test_most_important_takes_the_largest_and_of_equals_the_first(importance, data):
    keep = data.draw(st.integers(0, len(importance)))
    kept = most_important(torch.tensor(importance, dtype=torch.float32), keep)
    assert kept.tolist() == sorted(ranked(importance)[:keep])


@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(0, 6))
def test_most_important_chooses_in_every_row_by_itself(rows, keep):
    kept = most_important(torch.tensor(rows, dtype=torch.float32), keep)
    assert kept.tolist() == [sorted(ranked(row)[:keep]) for row in rows]


@given(importances, st.data())
def test_most_and_least_important_takes_from_both_ends(importance, data):
    keep = data.draw(st.integers(0, len(importance)))
    keep_least = data.draw(st.integers(0, len(importance) + 2))
    kept = most_and_least_important(torch.tensor(importance, dtype=torch.float32), keep, keep_least).tolist()
    least = min(keep_least, keep)
    order = ranked(importance)
    assert kept == sorted(order[: keep - least] + order[len(order) - least :])
    assert len(set(kept)) == keep


def test_of_very_many_equals_the_first_are_taken():
    """Sorts that keep no order among equals show it on long inputs alone."""
    importance = torch.zeros(100_000).index_fill(0, torch.arange(0, 100_000, 3), 1)
    assert most_important(importance, 500).tolist() == list(range(0, 1500, 3))
    assert most_and_least_important(importance, 500, 1).tolist() == [*range(0, 1497, 3), 99_998]


def test_without_least_important_units_it_is_the_most_important():
    importance = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    assert most_and_least_important(importance, 3, 0).tolist() == most_important(importance, 3).tolist() == [0, 2, 4]


def test_the_least_important_unit_takes_the_place_of_the_last_chosen():
    assert most_and_least_important(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), 3, 1).tolist() == [0, 1, 2]


def test_no_more_of_the_least_important_than_there_is_room_for():
    assert most_and_least_important(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0]), 2, 4).tolist() == [1, 3]
