"""Anderson acceleration of a fixed-point iteration, each row on its own."""

from __future__ import annotations

import torch
from torch import Tensor


class AndersonAcceleration:
    """Extrapolates the iteration p ← T(p) of a nonexpansive map T from its last few steps (type II).

    With r(p) = T(p) - p, the next point is T(p) - ΔT γ, γ the least-squares solution of Δr γ ≈ r(p), Δ the differences
    between consecutive points. A nonexpansive map never lengthens r along its own steps, so where r has grown to more
    than twice its shortest (rounding makes it grow a little) the extrapolation is to blame: that row goes back to the
    plain step it could have taken, and forgets its past.

    Attributes:
        point: (rows, n), where to evaluate T next.
    """

    def __init__(self, start: Tensor, memory: int) -> None:
        rows, width = start.shape
        self.point = start
        self._shortest = start.new_full((rows, 1), torch.inf)
        self._image: Tensor | None = None  # of the last point that did not fail, as are the residuals
        self._residual: Tensor | None = None
        self._image_differences = start.new_zeros(rows, memory, width)
        self._residual_differences = start.new_zeros(rows, memory, width)
        self._slot = 0

    def step(self, image: Tensor) -> None:
        """Moves on, given T(point), (rows, n)."""
        residual = image - self.point
        length = residual.norm(dim=1, keepdim=True)
        failed = ~(length <= 2 * self._shortest)
        self._shortest = torch.fmin(self._shortest, length)
        if self._image is not None and self._residual is not None:
            image, residual = torch.where(failed, self._image, image), torch.where(failed, self._residual, residual)
            self._image_differences[:, self._slot] = image - self._image
            self._residual_differences[:, self._slot] = residual - self._residual
            self._image_differences[failed.squeeze(1)] = 0
            self._residual_differences[failed.squeeze(1)] = 0
            self._slot = (self._slot + 1) % self._image_differences.shape[1]
        self._image, self._residual = image, residual
        self.point = self._extrapolated(image, residual)

    def keep(self, rows: Tensor) -> None:
        """Goes on, after a step or more, with these rows alone: a mask (rows,)."""
        for name in vars(self).keys() - {"_slot"}:
            setattr(self, name, getattr(self, name)[rows])

    def _extrapolated(self, image: Tensor, residual: Tensor) -> Tensor:
        """T(p) - ΔT γ; the plain step T(p) where nothing is remembered."""
        differences = self._residual_differences
        normal = differences @ differences.mT
        # Steps that point the same way, and slots still empty, make it singular.
        size = normal.diagonal(dim1=1, dim2=2).amax(dim=1)
        finfo = torch.finfo(normal.dtype)
        normal.diagonal(dim1=1, dim2=2).add_((finfo.eps * 1e3 * size + finfo.tiny)[:, None])
        combination, _ = torch.linalg.solve_ex(normal, differences @ residual[:, :, None])
        return image - (self._image_differences.mT @ combination).squeeze(2)
