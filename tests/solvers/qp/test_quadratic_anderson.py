"""Anderson acceleration, on maps whose fixed points are known."""

from __future__ import annotations

import torch

from distprune.solvers.qp.anderson import AndersonAcceleration


def contraction(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slow symmetric maps p ← A p + c, with eigenvalues up to 0.999."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(rows, width, width, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.linspace(-0.5, 0.999, width, dtype=torch.float64)
    return (basis * eigenvalues) @ basis.mT, torch.randn(rows, width, generator=generator, dtype=torch.float64)


def accelerated(linear: torch.Tensor, constant: torch.Tensor, evaluations: int) -> torch.Tensor:
    iterates = AndersonAcceleration(torch.zeros_like(constant), memory=5)
    for _ in range(evaluations):
        iterates.step((linear @ iterates.point[:, :, None]).squeeze(2) + constant)
    return iterates.point


def test_a_linear_map_of_few_dimensions_is_solved_in_as_many_steps():
    linear, constant = contraction(rows=4, width=5)
    fixed = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - linear, constant)
    torch.testing.assert_close(accelerated(linear, constant, 8), fixed, atol=1e-6, rtol=1e-6)


def test_a_row_goes_its_way_whatever_the_others_do():
    linear, constant = contraction(rows=3, width=9)
    together = accelerated(linear, constant, 12)
    for row in range(3):
        alone = accelerated(linear[[row]], constant[[row]], 12)
        torch.testing.assert_close(alone[0], together[row])


def test_rows_that_are_kept_go_on_as_if_nothing_had_happened():
    linear, constant = contraction(rows=3, width=9)
    iterates, kept = AndersonAcceleration(torch.zeros_like(constant), memory=5), torch.tensor([True, False, True])
    for evaluation in range(12):
        if evaluation == 6:
            iterates.keep(kept)
            linear, constant = linear[kept], constant[kept]
        iterates.step((linear @ iterates.point[:, :, None]).squeeze(2) + constant)
    torch.testing.assert_close(iterates.point, accelerated(*contraction(rows=3, width=9), 12)[kept])


def test_an_extrapolation_that_fails_is_taken_back():
    def image(points: torch.Tensor) -> torch.Tensor:
        return torch.where(points < 10, 0.9 * points, 2 * points)

    iterates = AndersonAcceleration(torch.tensor([[1.0, 3.0]]), memory=2)
    iterates.step(image(iterates.point))
    plain = image(iterates.point)
    iterates.step(plain)
    for failed in (50.0, torch.nan):
        iterates.point = torch.full((1, 2), failed)
        iterates.step(image(iterates.point))
        assert torch.equal(iterates.point, plain)
    iterates.step(image(iterates.point))
    assert (iterates.point < plain).all()
