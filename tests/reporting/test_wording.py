"""Numbers as people read them."""

from __future__ import annotations

import pytest

from distprune.reporting.pages.wording import duration, short_bytes, short_count, three_digits


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (999, "999"), (591_360, "591 K"), (999_700, "1 M"), (70_553_706_496, "70.6 B"), (1_234_567, "1.23 M")],
)
def test_counts(number, said):
    assert short_count(number) == said


@pytest.mark.parametrize(("size", "said"), [(512, "512 bytes"), (2_531_072, "2.53 MB"), (141_107_412_992, "141 GB")])
def test_bytes(size, said):
    assert short_bytes(size) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(1240.4, "1,240"), (12.34, "12.3"), (2.0, "2"), (0.00123456, "0.00123"), (1.5e-7, "1.50e-07"), (-0.5, "-0.5")],
)
def test_three_digits(number, said):
    assert three_digits(number) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(2.533, "2.53 s"), (59.9, "59.9 s"), (725.2, "12 min 5 s"), (11_530, "3 h 12 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said
