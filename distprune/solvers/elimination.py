"""Optimal brain surgeon on whole units: inputs of a linear map leave one after another, and the rest make up for them.

Hassibi & Stork (1993) for single weights; for the columns that a unit feeds, all output channels share one inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.solvers.selection import channels_of, most_important, others


def eliminate(
    weight: Tensor,
    gram: Tensor,
    keep: int,
    damping: float,
    *,
    width: int = 1,
    largest_batch: int = 1,
    smallest_batch: int = 1,
) -> tuple[Tensor, Tensor]:
    """Greedily remove the units that are missed least, each time moving the other columns to where they help most.

    With H = G + λI, λ = damping · mean(diag G), and U the columns of a unit, removing it raises the least attainable
    error tr(ΔHΔᵀ) by tr(W_U (H⁻¹_UU)⁻¹ W_Uᵀ), and is best answered by W ← W - W_U (H⁻¹_UU)⁻¹ H⁻¹_U. In the end the
    weight is the ridge regression of the whole layer's output on the kept columns, so it is never worse than they are
    unchanged, with damping or without.

    A step removes the batch of units that cost least one by one, at once and exactly: half of what must still go, but
    no more than ``largest_batch`` and no fewer than ``smallest_batch``. Batches of 1 see after each unit what the
    others are worth now; n columns then take O(n²) a step, while a batch of k takes O(kn²) in matrix products.

    It is done in float64, since outlier channels give H a condition number near 1/ε of float32, and every step works
    on what the last one left of the inverse.

    Args:
        weight: W, (out, units · width).
        gram: G, (units · width, units · width), the second moment of the inputs, any rank.
        keep: how many units stay.
        damping: > 0, relative to the mean of the Gram matrix's diagonal. Where that is zero, H is the identity.
        width: columns a unit has, in a row.
        largest_batch: ≥ 1, units that go at once at most.
        smallest_batch: ≥ 1, units that go at once at least, except for the last batch.

    Returns:
        The indices of the units that stay, (keep,), ascending, and their updated columns, (out, keep · width), of the
        weight's dtype.

    Raises:
        torch.linalg.LinAlgError: G is further from positive semidefinite than the damping makes up for, or not finite.
    """
    dtype, units = weight.dtype, torch.arange(weight.shape[1] // width, device=weight.device)
    weight, inverse = weight.double(), damped_inverse(gram, damping)
    while excess := len(units) - keep:
        batch = min(excess, max(smallest_batch, min(largest_batch, excess // 2)))
        kept = most_important(removal_costs(weight, inverse, width), len(units) - batch)
        weight, inverse, _ = without_others(weight, inverse, channels_of(kept, width))
        units = units[kept]
    return units, weight.to(dtype)


def elimination_path(
    weight: Tensor, gram: Tensor, damping: float, *, width: int = 1, batch: int = 1
) -> tuple[Tensor, Tensor]:
    """The order in which :func:`eliminate` would remove all units, ``batch`` at a time, and what that costs.

    Args:
        weight, gram, damping, width: as there.
        batch: units that go at once; the last batch may be smaller.

    Returns:
        The units, (units,), those that go first before the others; and the least attainable error tr(ΔHΔᵀ) when the
        first 0, 1, 2... batches are gone, (batches + 1,) in float64.

    Raises:
        torch.linalg.LinAlgError: G is further from positive semidefinite than the damping makes up for, or not finite.
    """
    units = torch.arange(weight.shape[1] // width, device=weight.device)
    weight, inverse = weight.double(), damped_inverse(gram, damping)
    order, errors = [], [weight.new_zeros(())]
    while len(units):
        cheapest = torch.argsort(removal_costs(weight, inverse, width), stable=True)
        kept = cheapest[batch:].sort().values
        order.append(units[cheapest[:batch]])
        weight, inverse, error = without_others(weight, inverse, channels_of(kept, width))
        errors.append(errors[-1] + error)
        units = units[kept]
    return torch.cat(order), torch.stack(errors)


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """(G + λI)⁻¹ in float64, symmetric. Never more than two such matrices are held."""
    damped = gram.to(torch.float64, copy=True)
    scale = damped.diagonal().mean()
    damped.diagonal().add_(torch.where(scale > 0, damping * scale, 1.0))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped, out=damped))


def removal_costs(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """tr(W_U (H⁻¹_UU)⁻¹ W_Uᵀ) for every unit's columns U, (units,): ‖w‖² / H⁻¹_jj where a unit is one column j."""
    if width == 1:
        return weight.square().sum(dim=0) / inverse.diagonal()
    units = weight.unflatten(1, (-1, width)).permute(1, 2, 0)
    blocks = inverse.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2).movedim(2, 0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), units, upper=False)
    return whitened.square().sum(dim=(1, 2))


def without_others(weight: Tensor, inverse: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight's ``kept`` columns, updated for the loss of the others, the inverse of what is left of H, and by how
    much the error rises, ()."""
    gone = others(kept, len(inverse))
    factor = torch.linalg.cholesky(inverse[gone[:, None], gone])
    coupling = torch.linalg.solve_triangular(factor, inverse[gone[:, None], kept], upper=False)
    lost = torch.linalg.solve_triangular(factor, weight[:, gone].mT, upper=False)
    return (
        weight[:, kept].addmm_(lost.mT, coupling, alpha=-1),
        inverse[kept[:, None], kept].addmm_(coupling.mT, coupling, alpha=-1),
        lost.square().sum(),
    )
