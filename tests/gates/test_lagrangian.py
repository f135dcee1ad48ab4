"""The constraint on the expected size."""

from __future__ import annotations

import pytest
import torch

from distprune.gates import ascended, penalty, ramped


def test_the_penalty_is_linear_and_quadratic_in_what_is_too_much():
    multipliers = torch.tensor([3.0, 5.0])
    assert penalty(torch.tensor(0.9), 0.7, multipliers).item() == pytest.approx(3 * 0.2 + 5 * 0.2**2)
    assert penalty(torch.tensor(0.6), 0.7, multipliers).item() == pytest.approx(3 * -0.1 + 5 * 0.1**2)


def test_multipliers_ascend_by_the_penaltys_gradient_in_them():
    multipliers = torch.tensor([3.0, 5.0], requires_grad=True)
    size = torch.tensor(0.6)
    penalty(size, 0.7, multipliers).backward()
    found = ascended(multipliers.detach(), size, 0.7, rate=2.0)
    torch.testing.assert_close(found, (multipliers + 2 * multipliers.grad).detach())


def test_the_target_falls_in_a_line_and_then_stays():
    assert [ramped(0.6, step, 4) for step in range(6)] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.6, 0.6])
    assert ramped(0.6, 0, 0) == pytest.approx(0.6)


def test_ascent_and_descent_come_to_rest_at_the_target():
    """min over s of -2s, of which the constraint s = 0.7 costs a multiplier of 2."""
    size, multipliers = 1.0, torch.zeros(2, dtype=torch.float64)
    for _ in range(4000):
        at = torch.tensor(size, dtype=torch.float64, requires_grad=True)
        (-2 * at + penalty(at, 0.7, multipliers)).backward()
        multipliers = ascended(multipliers, at, 0.7, rate=0.5)
        size -= 0.05 * at.grad.item()
    assert size == pytest.approx(0.7, abs=1e-3) and multipliers[0].item() == pytest.approx(2, abs=0.05)
