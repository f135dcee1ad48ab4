"""The constraint on the expected size."""

from __future__ import annotations

import pytest
import torch

from distprune.gates import penalty, ramped


def test_the_penalty_is_linear_and_quadratic_in_what_is_too_much():
    multipliers = torch.tensor([3.0, 5.0])
    assert penalty(torch.tensor(0.9), 0.7, multipliers).item() == pytest.approx(3 * 0.2 + 5 * 0.2**2)
    assert penalty(torch.tensor(0.6), 0.7, multipliers).item() == pytest.approx(3 * -0.1 + 5 * 0.1**2)


def test_the_target_falls_in_a_line_and_then_stays():
    assert [ramped(0.6, step, 4) for step in range(6)] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.6, 0.6])
    assert ramped(0.6, 0, 0) == pytest.approx(0.6)
